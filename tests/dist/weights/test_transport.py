"""Plans carried out over gloo: what arrives, and how many bytes were sent for it."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.errors import DeadlineError, GeometryError
from megatron_rpp.weights.layout import HFLayout, Layout, MegatronLayout
from megatron_rpp.weights.planner import Plan, plan
from megatron_rpp.weights.transport import iter_buckets
from tests.dist.ranks import run_ranks
from tests.unit.weights.models import filled, model_of, random_hf, same
from tests.unit.weights.slices import EngineSlices


def make(name: str, dst_kind: str, tp: int, pp: int, vpp: int) -> tuple[MegatronLayout, Layout, Plan]:
    model, ranks, dtype = model_of(name), dist.get_world_size(), torch.bfloat16
    src = MegatronLayout.even(model, tp=tp, pp=pp, vpp=vpp, replicas=ranks // (tp * pp), dtype=dtype)
    dst: Layout
    if dst_kind == "slices":
        dst = EngineSlices(model, ranks, ranks, dtype)
    else:
        dst = HFLayout.of(model, dtype=dtype, ranks=ranks, holders=(0,) if dst_kind == "one" else tuple(range(0, ranks, 2)))
    return src, dst, plan(src, dst, bucket_bytes=3000)


def exchange_and_count(rank: int, *case: Any) -> int:
    """Asserts that every tensor arrives bitwise and that the wire carried what was planned; returns the number of buckets."""
    src, dst, found = make(*case)
    hf, wire, send = random_hf(src.model, torch.bfloat16), [0, 0], dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, output_split: list[int], input_split: list[int], **rest: Any) -> Any:
        assert input_split[rank] == output_split[rank] == 0, "a copy on one rank went over the wire"
        wire[0] += given.numel() * given.element_size()
        wire[1] += output.numel() * output.element_size()
        return send(output, given, output_split, input_split, **rest)

    received: dict[str, Tensor] = {}
    with patch.object(dist, "all_to_all_single", counted):
        for bucket in iter_buckets(found, filled(src, hf)[rank], group=dist.group.WORLD, deadline_s=30):
            assert not received.keys() & bucket.keys()
            received |= bucket
    expected = filled(dst, hf)[rank]
    assert received.keys() == expected.keys()
    # The padding of a vocabulary shard is NaN in `expected`; the engine gets zeros there.
    assert all(same(received[key], expected[key].nan_to_num(0.0)) for key in expected)
    assert wire == [found.sent_bytes(rank), sum(bucket.received_bytes(rank) for bucket in found.buckets)]
    return len(found.buckets)


CASES = {
    2: [("llama", "one", 2, 1, 1), ("qwen2.5, biases and tied", "some", 1, 2, 2)],
    4: [
        ("qwen3, norms and a wide head", "some", 2, 2, 2),
        ("qwen2, biases", "one", 1, 2, 1),
        ("qwen3, tied, 2 KV heads", "slices", 4, 1, 1),
        ("llama, tied", "slices", 2, 2, 2),
    ],
}


def all_cases(rank: int) -> list[int]:
    return [exchange_and_count(rank, *case) for case in CASES[dist.get_world_size()]]


@pytest.mark.parametrize("ranks", CASES)
def test_what_arrives_is_hf_bitwise_and_costs_the_planned_bytes(ranks: int) -> None:
    buckets = run_ranks(ranks, all_cases)
    assert buckets == [buckets[0]] * ranks
    assert min(buckets[0]) > 5


def stay_away(rank: int) -> str:
    src, _, found = make("llama", "one", 2, 1, 1)
    if rank == 1:
        time.sleep(4)
        return ""
    with pytest.raises(DeadlineError) as error:
        list(iter_buckets(found, filled(src, random_hf(src.model, torch.bfloat16))[rank], group=dist.group.WORLD, deadline_s=1.0))
    return str(error.value)


def test_a_rank_that_does_not_come_is_a_deadline_with_the_buckets_name() -> None:
    message = run_ranks(2, stay_away)[0]
    assert message.startswith("wait 'weights bucket 1 of")
    assert "rank 0 waited longer than 1 s" in message


def alone(rank: int) -> None:
    """One rank: first a plan that is not for it, then one in which nothing has to travel."""
    model = model_of("llama, tied")
    src = MegatronLayout.even(model, tp=2, dtype=torch.float32)
    found = plan(src, HFLayout.of(model, dtype=torch.float32, ranks=2, holders=(0,)))
    with pytest.raises(GeometryError, match="another world"):
        next(iter_buckets(found, {}, group=dist.group.WORLD, deadline_s=1.0))
    hf, src = random_hf(model), MegatronLayout.even(model, tp=1, dtype=torch.float32)
    found = plan(src, HFLayout.of(model, dtype=torch.float32, ranks=1, holders=(0,)), bucket_bytes=5000)
    received: dict[str, Tensor] = {}
    with patch.object(dist, "all_to_all_single", side_effect=AssertionError("nothing had to travel")):
        for bucket in iter_buckets(found, filled(src, hf)[0], group=dist.group.WORLD, deadline_s=1.0):
            received |= bucket
    assert received.keys() == hf.keys()
    assert all(same(received[key], hf[key]) for key in hf)


def test_one_rank_copies_and_refuses_a_plan_for_two() -> None:
    run_ranks(1, alone)
