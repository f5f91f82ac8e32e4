"""Plans of models and clusters that no test could move: how long one rank takes, how even the work is, and who agrees."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from megatron_rpp.weights import planner
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import Layout, MegatronLayout
from megatron_rpp.weights.planner import Plan, plan
from tests.unit.weights.experts import Engines, Sizes, Training

MIB = 2**20
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def pair_70b() -> tuple[Layout, Layout, tuple[int, ...]]:
    """TP8 x PP4 on 32 GPUs of four nodes, four engines of TP8."""
    model, dtype = describe(LLAMA_70B), torch.bfloat16
    src = MegatronLayout.even(model, tp=8, pp=4, dtype=dtype)
    return src, MegatronLayout.even(model, tp=8, replicas=4, dtype=dtype), tuple(rank // 8 for rank in range(32))


def pair_moe() -> tuple[Layout, Layout, tuple[int, ...]]:
    """61 layers of 256 experts: PP16 x EP16 on 256 GPUs, 16 engines of TP16 / EP16."""
    return Training(Sizes(), pp=16, ep=16), Engines(Sizes(), tp=16, ranks=256), tuple(rank // 8 for rank in range(256))


def afresh(rank: int | None, pair: tuple[Layout, Layout, tuple[int, ...]], bucket_bytes: int) -> tuple[Plan, float]:
    """A plan made from nothing, layouts included, and the processor seconds that it took."""
    planner._schedule.cache_clear()
    plan.cache_clear()
    src, dst, nodes = pair
    start = time.process_time()
    return plan(src, dst, rank=rank, nodes=nodes, bucket_bytes=bucket_bytes), time.process_time() - start


def test_a_rank_of_a_70b_plans_in_two_seconds_and_a_plan_that_is_there_costs_nothing() -> None:
    found, seconds = afresh(13, pair_70b(), 64 * MIB)
    assert seconds < 2.0
    assert all(13 in (t.src, t.dst) for t in found.transfers)
    src, dst, nodes = pair_70b()
    plan(src, dst, rank=13, nodes=nodes, bucket_bytes=64 * MIB)
    start = time.process_time()
    assert plan(src, dst, rank=13, nodes=nodes, bucket_bytes=64 * MIB) is found
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("bucket_mib", [512, 64])
def test_all_ranks_of_a_70b_work_alike_in_every_bucket_within_its_bound(bucket_mib: int) -> None:
    found, _ = afresh(None, pair_70b(), bucket_mib * MIB)
    total = 17.64e9 / (bucket_mib * MIB)
    assert total < len(found.buckets) < 1.05 * total + 1
    for bucket in found.buckets:
        sent = [bucket.sent_bytes(rank) for rank in range(32)]
        received = [bucket.inbox_bytes(rank) for rank in range(32)]
        assert max(sent) / (sum(sent) / 32) < 1.1
        assert max(*sent, *received) <= bucket_mib * MIB
    own = plan(*pair_70b()[:2], rank=5, nodes=pair_70b()[2], bucket_bytes=bucket_mib * MIB)
    assert [t for t in found.transfers if 5 in (t.src, t.dst)] == list(own.transfers)


def test_a_rank_of_256_plans_a_model_as_large_as_deepseek_v3_in_ten_seconds_and_its_peers_agree() -> None:
    pair = pair_moe()
    found, seconds = afresh(77, pair, planner.BUCKET_BYTES)
    start = time.process_time()
    digest = found.digest
    assert seconds + time.process_time() - start < 10.0
    peer = max(t.dst for t in found.transfers if t.src == 77)
    other, _ = afresh(peer, pair, planner.BUCKET_BYTES)
    assert other.digest == digest
    for mine, theirs in zip(found.buckets, other.buckets, strict=True):
        assert mine.between(77, peer) == theirs.between(77, peer) != ()
        assert mine.between(peer, 77) == theirs.between(peer, 77)
    needed = sum(local.num_bytes for local in pair[1].locals(77))
    assert sum(t.num_bytes for t in found.transfers if t.dst == 77) == needed
    for bucket in found.buckets:
        assert max(bucket.sent_bytes(77), bucket.inbox_bytes(77)) <= planner.BUCKET_BYTES
    sent = [0] * 256
    for lane in found.schedule.lanes:
        sent[lane.src] += lane.num_bytes * (not lane.is_local)
    for stage in range(16):  # stages differ by their number of layers
        own = sent[stage * 16 : stage * 16 + 16]
        assert max(own) / (sum(own) / 16) < 1.001
