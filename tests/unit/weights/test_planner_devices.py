"""The order of an engine's GPUs: exact, and worth what it is said to be worth."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_rpp.config.schema import Parallel
from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.devices import Permuted, assign, best_devices, kept_bytes, planned_layout
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.planner import plan
from megatron_rpp.weights.rect import Local, Piece, Rect
from tests.unit.weights.models import carry_out, filled, model_of, random_hf, same
from tests.unit.weights.slices import EngineSlices
from tests.unit.weights.tables import Table
from tests.unit.weights.test_planner_scale import LLAMA_70B


@pytest.mark.parametrize("size", range(1, 7))
def test_an_assignment_is_as_good_as_the_best_of_all_orders(size: int) -> None:
    rng = random.Random(size)
    for _ in range(50):
        gain = [[rng.choice((0, 1, 2, rng.randrange(10**13))) for _ in range(size)] for _ in range(size)]
        found = assign(gain)
        assert sorted(found) == list(range(size))
        best = max(sum(gain[row][col] for row, col in enumerate(order)) for order in itertools.permutations(range(size)))
        assert sum(gain[row][col] for row, col in enumerate(found)) == best


@pytest.mark.parametrize("seed", range(20))
def test_of_equally_good_orders_the_one_that_moves_fewest_is_taken(seed: int) -> None:
    """Rank j holds, and engine rank i wants, one element for each pair (i, j) that has something in common."""
    rng = random.Random(seed)
    common = [[rng.random() < 0.5 for _ in range(4)] for _ in range(4)]
    element = lambda i, j: Local(f"{i} {j}", (1, 1), torch.float32, (Piece(Rect(f"{i} {j}", 0, 0, 1, 1)),))  # noqa: E731
    src = Table(tuple(tuple(element(i, j) for i in range(4) if common[i][j]) for j in range(4)))
    dst = Table(tuple(tuple(element(i, j) for j in range(4) if common[i][j]) for i in range(4)))
    found = best_devices(src, dst, engine=(0, 1, 2, 3))

    def worth(order: tuple[int, ...]) -> tuple[int, int]:
        return sum(common[i][j] for i, j in enumerate(order)), sum(i == j for i, j in enumerate(order))

    assert worth(found) == max(worth(order) for order in itertools.permutations(range(4)))


def copies(src: MegatronLayout, dst: MegatronLayout, devices: tuple[int, ...]) -> float:
    """GB that stay on their GPU, mean over the ranks."""
    found = plan(src, Permuted(dst, devices))
    return sum(transfer.num_bytes for transfer in found.transfers if transfer.src == transfer.dst) / dst.ranks / 1e9


@pytest.mark.parametrize(("tp", "pp", "before", "after"), [(4, 2, 2.2, 8.8), (2, 4, 2.2, 4.4), (8, 1, 17.6, 17.6)])
def test_the_best_order_keeps_a_70b_where_it_is(tp: int, pp: int, before: float, after: float) -> None:
    model, dtype = describe(LLAMA_70B), torch.bfloat16
    src, dst = MegatronLayout.even(model, tp=tp, pp=pp, dtype=dtype), MegatronLayout.even(model, tp=8, dtype=dtype)
    devices = best_devices(src, dst, engine=tuple(range(8)))
    assert copies(src, dst, tuple(range(8))) == pytest.approx(before, abs=0.05)
    assert copies(src, dst, devices) == pytest.approx(after, abs=0.05)
    assert (devices == tuple(range(8))) == (tp == 8)


def test_where_no_order_is_better_nothing_moves() -> None:
    model, dtype = model_of("llama"), torch.bfloat16
    for tp, engine_tp, engine in ((4, 4, (0, 1, 2, 3)), (2, 2, (0, 1)), (1, 1, (0,)), (1, 4, (0, 1, 2, 3))):
        src = MegatronLayout.even(model, tp=tp, replicas=4 // tp, dtype=dtype)
        assert best_devices(src, EngineSlices(model, engine_tp, 4, dtype), engine=engine) == engine


def test_each_engine_has_an_order_of_its_own_gpus_and_what_arrives_there_is_right() -> None:
    model, dtype = model_of("qwen3, norms and a wide head"), torch.bfloat16
    src, dst = MegatronLayout.even(model, tp=2, pp=4, dtype=dtype), EngineSlices(model, 4, 8, dtype)
    orders = [best_devices(src, dst, engine=engine) for engine in ((0, 1, 2, 3), (4, 5, 6, 7))]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    placed = Permuted(dst, (*orders[0], *orders[1]))
    hf = random_hf(model, dtype)
    received, expected = carry_out(plan(src, placed), filled(src, hf), placed), filled(dst, hf)
    for rank, device in enumerate((*orders[0], *orders[1])):
        assert all(same(received[device][name], expected[rank][name]) for name in expected[rank])
    local = [sum(t.num_bytes for t in plan(src, to).transfers if t.src == t.dst) for to in (dst, placed)]
    assert local[1] > 1.5 * local[0]


def test_a_layout_is_planned_from_the_settings_alone() -> None:
    model, dtype = model_of("qwen3_moe"), torch.bfloat16
    planned = planned_layout(model, Parallel(tp=2, pp=2, dp=2, ep=2, vpp=2), dtype)
    assert planned == MegatronLayout.even(model, tp=2, pp=2, vpp=2, replicas=2, ep=2, dtype=dtype)
    assert planned_layout(model, Parallel(pp=3), dtype).layers == ((0,), (1,), (2, 3)), "near enough to choose an order by"
    kept, total = kept_bytes(planned, planned, tuple(range(8)))
    assert kept == total
    kept, total = kept_bytes(planned, Permuted(planned, (4, 5, 6, 7, 0, 1, 2, 3)), (0, 1, 2, 3))
    assert kept == 0 < total, "the stages have changed places"


def test_devices_must_be_a_permutation() -> None:
    with pytest.raises(GeometryError, match="not a permutation"):
        Permuted(EngineSlices(model_of("llama"), 2, 2, torch.bfloat16), (0, 0))
