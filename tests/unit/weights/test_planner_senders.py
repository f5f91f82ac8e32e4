"""Who is asked to send: the nearest, and of equally near ones all alike."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_rpp.weights.layout import HFLayout, MegatronLayout
from megatron_rpp.weights.planner import Plan, plan
from megatron_rpp.weights.rect import Rect
from megatron_rpp.weights.senders import fair_shares
from tests.unit.weights.experts import Engines, Sizes, Training
from tests.unit.weights.models import model_of
from tests.unit.weights.tables import Table, table

SMALL = Sizes(layers=8, experts=8, hidden=64, ffn=32, lora=16, heads=8, head=8, vocab=64)


def imbalance(sent: list[int]) -> float:
    """Largest over mean."""
    return max(sent) * len(sent) / sum(sent)


def sent(found: Plan, ranks: range) -> list[int]:
    return [found.sent_bytes(rank) for rank in ranks]


@pytest.mark.parametrize("seed", range(20))
def test_fair_shares_are_those_of_handing_out_one_unit_at_a_time_to_the_least_loaded(seed: int) -> None:
    rng = random.Random(seed)
    loads, total = [rng.randint(0, 30) for _ in range(rng.randint(1, 6))], rng.randint(0, 60)
    slow = list(loads)
    for _ in range(total):
        slow[slow.index(min(slow))] += 1
    found = fair_shares(loads, total)
    assert sum(found) == total and min(found) >= 0
    assert sorted(load + share for load, share in zip(loads, found, strict=True)) == sorted(slow)


@pytest.mark.parametrize("readers", [1, 3, 4, 5])
def test_without_a_near_copy_all_replicas_send_alike_in_every_bucket(readers: int) -> None:
    """Four replicas on one node, any number of readers on another: no count of readers needs to divide."""
    model = model_of("llama")
    src = replace(MegatronLayout.even(model, tp=1, dtype=torch.float32), replicas=4)
    ranks = 4 + readers
    dst = HFLayout.of(model, dtype=torch.float32, ranks=ranks, holders=tuple(range(4, ranks)))
    nodes = (0, 0, 0, 0) + (1,) * readers
    for is_whole in (False, True):
        found = plan(src, dst, nodes=nodes, bucket_bytes=40_000, whole_tensors=is_whole)
        assert imbalance(sent(found, range(4))) < 1.01
        assert len(found.buckets) > 4
        assert max(imbalance([bucket.sent_bytes(rank) for rank in range(4)]) for bucket in found.buckets) < 1.1
        received = [sum(t.num_bytes for t in found.transfers if t.dst == rank) for rank in range(4, ranks)]
        assert received == [sum(local.num_bytes for local in dst.locals(4))] * readers


def test_a_holder_that_must_serve_its_neighbours_is_spared_by_those_who_may_choose() -> None:
    """Rank 0 is the only holder on node 0, where two readers are; the reader on node 2 takes from rank 1 alone."""
    w = Rect("w", 0, 0, 64, 8)
    held, nothing = table(w).table[0], ()
    src = Table((held, held, nothing, nothing, nothing))
    dst = Table((nothing, nothing, held, held, held))
    found = plan(src, dst, nodes=(0, 1, 0, 0, 2))
    assert {(t.src, t.dst) for t in found.transfers} == {(0, 2), (0, 3), (1, 4)}


def test_no_byte_crosses_a_node_or_a_gpu_that_need_not() -> None:
    """Replicated parts of every stage are on both nodes of a stage, and on the reader's own GPU for its own stage."""
    src, dst = Training(SMALL, pp=2, ep=4), Engines(SMALL, tp=4, ranks=8)
    nodes = (0, 0, 1, 1, 1, 1, 0, 0)  # both stages have two ranks on each node, but not the same experts
    crossed: Counter[str] = Counter()
    for transfer in plan(src, dst, nodes=nodes).transfers:
        holders = [rank for rank in range(8) for local in src.locals(rank) if any(p.rect == transfer.src_piece.rect for p in local.pieces)]
        assert transfer.src == transfer.dst or transfer.dst not in holders
        near = [rank for rank in holders if nodes[rank] == nodes[transfer.dst]]
        assert nodes[transfer.src] == nodes[transfer.dst] or not near
        crossed["expert" if ".experts." in transfer.rect.hf else "dense"] += nodes[transfer.src] != nodes[transfer.dst]
    assert crossed["dense"] == 0 < crossed["expert"]


def test_a_mixture_of_experts_has_balanced_senders_and_few_of_them_for_each_receiver() -> None:
    """Four equal stages: what ranks send differs only by the embedding and the head, and one message goes a long way."""
    src, dst = Training(SMALL, pp=4, ep=8), Engines(SMALL, tp=8, ranks=32)
    found = plan(src, dst, nodes=tuple(rank // 8 for rank in range(32)), bucket_bytes=30_000)
    assert len(found.buckets) > 4
    assert imbalance(sent(found, range(32))) < 1.1
    for bucket in found.buckets:
        assert imbalance([bucket.sent_bytes(rank) for rank in range(32)]) < 1.15
    peers = Counter(dst for _, dst in {(t.src, t.dst) for t in found.transfers})
    # For each other stage the one that has its experts, and about one of the eight that have its dense part.
    assert sum(peers.values()) / 32 < 3 * 2 + 2
