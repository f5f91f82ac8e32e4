"""Plans that cut tensors: their bound, their alignment, and that the views of all ranks fit together."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.buckets import ALIGN_BYTES
from megatron_rpp.weights.layout import HFLayout, Layout, MegatronLayout
from megatron_rpp.weights.planner import Plan, plan
from megatron_rpp.weights.rect import Rect, Shape
from tests.unit.weights.models import carry_out, filled, model_of, same
from tests.unit.weights.slices import EngineSlices
from tests.unit.weights.tables import Table, random_partition, table

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float64)
SEEDS = range(40)


def random_pair(seed: int) -> tuple[dict[str, Shape], Table, Table, tuple[int, ...]]:
    """Two random layouts of the same tensors, of several element sizes and odd shapes, on ranks of two nodes."""
    rng = random.Random(seed)
    shapes = {f"w{i}": (rng.randint(1, 40), rng.choice((1, 3, 7, 24))) for i in range(4)}
    dtypes = {name: rng.choice(DTYPES) for name in shapes}
    ranks = rng.randint(1, 6)
    src, dst = (random_partition(shapes, dtypes, ranks=ranks, seed=2 * seed + side) for side in (0, 1))
    return shapes, src, dst, tuple(rng.randint(0, 1) for _ in range(ranks))


def views_fit(whole: Plan, views: list[Plan]) -> None:
    """What each rank works out for itself is its part of the whole, in the same order on both ends of every message."""
    assert {one.digest for one in views} == {whole.digest}
    assert {len(one.buckets) for one in views} == {len(whole.buckets)}
    for number, bucket in enumerate(whole.buckets):
        assert bucket.completed == {rank: found for one in views for rank, found in one.buckets[number].completed.items()}
        own = [one.buckets[number] for one in views]
        for src in range(whole.ranks):
            assert sum(src in (t.src, t.dst) for t in bucket.transfers) == len(own[src].transfers)
            for dst in range(whole.ranks):
                assert own[src].between(src, dst) == own[dst].between(src, dst) == bucket.between(src, dst)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_two_layouts_are_carried_over_bitwise_within_the_bound_and_the_ranks_agree(seed: int) -> None:
    shapes, src, dst, nodes = random_pair(seed)
    rng = torch.Generator().manual_seed(seed)
    hf = {name: torch.randn(shape, generator=rng).to(dtype_in(src, name)) for name, shape in shapes.items()}
    bound = random.Random(seed).choice((700, 1500, 4000, 1 << 20))
    found = plan(src, dst, nodes=nodes, bucket_bytes=bound)
    received, expected = carry_out(found, filled(src, hf), dst), filled(dst, hf)
    for rank in range(dst.ranks):
        assert all(torch.equal(bits(received[rank][key]), bits(expected[rank][key])) for key in expected[rank])
        for bucket in found.buckets:
            assert max(bucket.sent_bytes(rank), bucket.inbox_bytes(rank)) <= bound
    needed = sum(piece.rect.area * local.dtype.itemsize for row in dst.table for local in row for piece in local.pieces)
    assert sum(transfer.num_bytes for transfer in found.transfers) == needed, "an element came twice, or not at all"
    views_fit(found, [plan(src, dst, rank=rank, nodes=nodes, bucket_bytes=bound) for rank in range(found.ranks)])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def dtype_in(layout: Table, hf: str) -> torch.dtype:
    return next(local.dtype for row in layout.table for local in row for piece in local.pieces if piece.rect.hf == hf)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_segment_of_a_message_starts_at_a_multiple_of_its_element_size_and_none_overlap(seed: int) -> None:
    _, src, dst, nodes = random_pair(seed)
    found = plan(src, dst, nodes=nodes, bucket_bytes=1000)
    for bucket in found.buckets:
        for rank in range(found.ranks):
            for placed, size in ((bucket.inbox(rank), bucket.inbox_bytes(rank)), (bucket.outbox(rank), bucket.sent_bytes(rank))):
                end = 0
                for transfer, at in placed:
                    assert at % transfer.dtype.itemsize == 0
                    assert end <= at <= end + ALIGN_BYTES
                    end = at + transfer.num_bytes
                assert end <= size


def test_all_ranks_agree_whichever_way_the_tensors_are_kept_together() -> None:
    model = model_of("qwen3, tied, 2 KV heads")
    src = MegatronLayout.even(model, tp=2, pp=2, vpp=2, replicas=2, dtype=torch.bfloat16)
    nodes = (0, 0, 1, 1, 2, 2, 3, 3)
    targets: tuple[tuple[Layout, bool], ...] = (
        (EngineSlices(model, 4, 8, torch.bfloat16), False),
        (HFLayout.of(model, dtype=torch.bfloat16, ranks=8, holders=(0, 4)), True),
    )
    for dst, is_whole in targets:
        make = {"nodes": nodes, "bucket_bytes": 4096, "whole_tensors": is_whole}
        views_fit(plan(src, dst, **make), [plan(src, dst, rank=rank, **make) for rank in range(8)])


def test_the_digest_tells_plans_apart_that_differ_in_one_thing() -> None:
    model = model_of("llama")
    src, dst = (MegatronLayout.even(model, tp=tp, pp=4 // tp, dtype=torch.bfloat16) for tp in (2, 4))
    others = [
        plan(src, dst, bucket_bytes=4096),
        plan(src, dst, bucket_bytes=8192),
        plan(src, dst, bucket_bytes=4096, whole_tensors=True),
        plan(src, HFLayout.of(model, dtype=torch.bfloat16, ranks=4, holders=(3,)), bucket_bytes=4096),
        plan(MegatronLayout.even(model, tp=2, pp=2, vpp=2, dtype=torch.bfloat16), dst, bucket_bytes=4096),
        plan(src, MegatronLayout.even(model, tp=4, dtype=torch.float32), bucket_bytes=4096),
    ]
    assert len({one.digest for one in others}) == len(others)


def test_rows_are_cut_only_where_they_are_wider_than_a_thousandth_of_a_bucket() -> None:
    src, dst = table(Rect("w", 0, 0, 2048, 24), Rect("w", 2048, 0, 2048, 24)), table(Rect("w", 0, 0, 1, 24), Rect("w", 1, 0, 4095, 24))
    for bound, has_cut_rows in ((100_000, False), (98_304, False), (98_303, True), (50_000, True)):
        found = plan(src, dst, bucket_bytes=bound)
        assert len(found.buckets) >= 4
        assert any(t.rect.cols < 24 for t in found.transfers) == has_cut_rows, bound


def test_a_tensor_larger_than_a_bucket_is_spread_over_many() -> None:
    model = model_of("llama")
    src = MegatronLayout.even(model, tp=2, pp=2, dtype=torch.float32)
    dst = EngineSlices(model, 4, 4, torch.float32)
    embedding = next(local for local in dst.locals(0) if local.name == "model.embed_tokens.weight")
    bound = embedding.num_bytes // 4
    found = plan(src, dst, bucket_bytes=bound)
    with_it = [bucket for bucket in found.buckets if any(t.dst_local == embedding.name for t in bucket.transfers)]
    assert len(with_it) >= 4
    for bucket in with_it:
        assert max(bucket.inbox_bytes(rank) for rank in range(4)) <= bound


def test_a_bucket_too_small_to_cut_anything_is_refused_with_the_size_it_needs() -> None:
    model = model_of("llama")
    src, dst = (MegatronLayout.even(model, tp=tp, pp=4 // tp, dtype=torch.bfloat16) for tp in (2, 4))
    with pytest.raises(GeometryError, match=r"buckets are too small\n  expected: > \d+ bytes\n  got: 16"):
        plan(src, dst, bucket_bytes=16)


def test_the_same_bits_arrive_whether_tensors_are_cut_or_not() -> None:
    """Padding stays untouched in both: no transfer covers it."""
    model = model_of("qwen2.5, biases and tied")
    src = MegatronLayout.even(model, tp=4, dtype=torch.float32)
    dst = EngineSlices(model, 2, 4, torch.float32)
    hf = {name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) for name, shape in model.hf_shapes.items()}
    sources = filled(src, hf)
    cut, uncut = (carry_out(plan(src, dst, bucket_bytes=2000, whole_tensors=whole), sources, dst) for whole in (False, True))
    for left, right in zip(cut, uncut, strict=True):
        assert left.keys() == right.keys()
        assert all(same(left[key], right[key]) for key in left)
