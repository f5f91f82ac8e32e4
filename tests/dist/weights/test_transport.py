"""Plans carried out over gloo: what arrives, how many bytes were sent for it, and when a buffer may be written again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.errors import DeadlineError, GeometryError
from megatron_rpp.weights.layout import HFLayout, Layout, MegatronLayout
from megatron_rpp.weights.planner import Plan, plan
from megatron_rpp.weights.rect import view
from megatron_rpp.weights.sglang_layout import SGLangLayout
from megatron_rpp.weights.transport import Delivery, Staging, deliver, iter_buckets
from tests.dist.ranks import RankError, run_ranks
from tests.unit.weights.models import blank, filled, model_of, random_hf, same
from tests.unit.weights.slices import EngineSlices

BUCKET_BYTES = 3000


def make(name: str, dst_kind: str, tp: int, pp: int, vpp: int, ep: int = 1, etp: int = 1) -> tuple[MegatronLayout, Layout, Plan]:
    """dst_kind: "one" or "some" leaders with whole tensors, "engines of N" ranks, or "SGLang of N" that share the experts."""
    model, ranks, dtype = model_of(name), dist.get_world_size(), torch.bfloat16
    src = MegatronLayout.even(model, tp=tp, pp=pp, vpp=vpp, replicas=ranks // (tp * pp), ep=ep, etp=etp, dtype=dtype)
    dst: Layout
    if dst_kind.startswith("SGLang"):
        engine_tp = int(dst_kind.split()[-1])
        dst = SGLangLayout(model, engine_tp, dtype, ep=engine_tp, engines=ranks // engine_tp)
    elif dst_kind.startswith("engines"):
        dst = EngineSlices(model, int(dst_kind.split()[-1]), ranks, dtype)
    else:
        dst = HFLayout.of(model, dtype=dtype, ranks=ranks, holders=(0,) if dst_kind == "one" else tuple(range(0, ranks, 2)))
    nodes = tuple(rank * 2 // ranks for rank in range(ranks))
    is_whole = isinstance(dst, HFLayout)
    return src, dst, plan(src, dst, rank=dist.get_rank(), nodes=nodes, bucket_bytes=BUCKET_BYTES, whole_tensors=is_whole)


class Wire:
    """Counts what is given to and taken from dist.all_to_all_single, and checks that no rank sends to itself."""

    def __init__(self) -> None:
        self.sent = self.received = self.calls = 0
        self._send = dist.all_to_all_single

    def __call__(self, output: Tensor, given: Tensor, output_split: list[int], input_split: list[int], **rest: Any) -> Any:
        rank = dist.get_rank()
        assert input_split[rank] == output_split[rank] == 0, "a copy on one rank went over the wire"
        assert sum(input_split) == given.numel() and sum(output_split) == output.numel()
        self.sent += given.numel() * given.element_size()
        self.received += output.numel() * output.element_size()
        self.calls += 1
        return self._send(output, given, output_split, input_split, **rest)


def receive(rank: int, found: Plan, sources: dict[str, Tensor], dst: Layout) -> dict[str, Tensor]:
    """Through staging slots into not-a-numbers, as an engine's loader does; for leaders, and on 8 ranks, as whole tensors."""
    if isinstance(dst, HFLayout) or found.ranks == 8:
        received: dict[str, Tensor] = {}
        for bucket in iter_buckets(found, sources, group=dist.group.WORLD, deadline_s=30):
            assert not received.keys() & bucket.keys()
            received |= bucket
        return received
    received = blank(dst.locals(rank))
    for delivery in deliver(found, sources, group=dist.group.WORLD, deadline_s=30):
        assert max(delivery.inbox.numel(), delivery.bucket.sent_bytes(rank)) <= BUCKET_BYTES
        with delivery:
            for transfer, values in delivery.parts:
                target = view(received[transfer.dst_local], transfer.dst_piece, transfer.rect)
                assert target.isnan().all(), "an element came twice"
                target.copy_(values)
    return {name: tensor.nan_to_num(0.0) for name, tensor in received.items()}


def exchange_and_count(rank: int, *case: Any) -> int:
    """Asserts that every tensor arrives bitwise and that the wire carried what was planned; returns the number of buckets."""
    src, dst, found = make(*case)
    hf, wire = random_hf(src.model, torch.bfloat16), Wire()
    with patch.object(dist, "all_to_all_single", wire):
        received = receive(rank, found, filled(src, hf)[rank], dst)
    expected = filled(dst, hf)[rank]
    assert received.keys() == expected.keys()
    # The padding of a vocabulary shard is NaN in `expected`; the engine gets zeros there.
    assert all(same(received[key], expected[key].nan_to_num(0.0)) for key in expected)
    assert (wire.sent, wire.received, wire.calls) == (found.sent_bytes(rank), found.received_bytes(rank), len(found.buckets))
    return len(found.buckets)


CASES = {
    2: [("llama", "one", 2, 1, 1), ("qwen2.5, biases and tied", "some", 1, 2, 2)],
    4: [
        ("qwen3, norms and a wide head", "some", 2, 2, 2),
        ("qwen2, biases", "one", 1, 2, 1),
        ("qwen3, tied, 2 KV heads", "engines of 4", 4, 1, 1),
        ("llama, tied", "engines of 4", 2, 2, 2),
        ("qwen2, biases", "engines of 4", 2, 2, 1),
        ("qwen2.5, biases and tied", "engines of 2", 2, 2, 1),
        ("llama", "engines of 2", 2, 2, 2),
        ("qwen3_moe", "SGLang of 2", 1, 2, 1, 2),
    ],
    8: [
        ("qwen2, biases", "engines of 4", 2, 2, 2),
        ("llama, tied", "engines of 2", 2, 2, 1),
        ("qwen3, tied, 2 KV heads", "engines of 8", 2, 4, 1),
        ("qwen3_moe", "SGLang of 4", 2, 2, 1, 2, 2),
    ],
}


def all_cases(rank: int) -> list[int]:
    return [exchange_and_count(rank, *case) for case in CASES[dist.get_world_size()]]


@pytest.mark.parametrize("ranks", CASES)
def test_what_arrives_is_hf_bitwise_and_costs_the_planned_bytes(ranks: int) -> None:
    buckets = run_ranks(ranks, all_cases)
    assert buckets == [buckets[0]] * ranks
    assert min(buckets[0]) > 5


def hold_buckets(rank: int) -> None:
    """What a consumer holds does not change while later buckets travel, as long as it has slots; then it is told."""
    src, _, found = make("llama", "engines of 2", 2, 2, 1)
    sources = filled(src, random_hf(src.model, torch.bfloat16))[rank]
    staging = Staging(found, rank, device=torch.device("cpu"), slots=3)
    held = []
    for delivery in deliver(found, sources, group=dist.group.WORLD, deadline_s=30, staging=staging):
        held.append((delivery, [values.clone() for _, values in delivery.parts]))
        if len(held) == 2:
            time.sleep(0.01 * rank)  # a peer that is ahead has sent its next messages by now
            first, copies = held.pop(0)
            assert all(same(values, copy) for (_, values), copy in zip(first.parts, copies, strict=True))
            first.release()
            assert first.parts == []
    held[0][0].release()
    two = Staging(found, rank, device=torch.device("cpu"))
    with pytest.raises(GeometryError, match="weights bucket 3: bucket 1 is still held"):
        for _ in deliver(found, sources, group=dist.group.WORLD, deadline_s=30, staging=two):
            pass
    dist.barrier()


def test_a_slot_is_not_written_again_before_it_is_released() -> None:
    run_ranks(4, hold_buckets)


def reuse(rank: int) -> None:
    """Two passes over one staging with other values: no buffer is made again, and nothing of the first pass is left."""
    src, dst, found = make("qwen2, biases", "engines of 4", 2, 2, 1)
    staging = Staging(found, rank, device=torch.device("cpu"))
    buffers = [buffer.data_ptr() for buffer in (*staging.outboxes, *staging.inboxes)]
    for seed in (1, 2):
        hf = random_hf(src.model, torch.bfloat16, seed)
        received = {local.name: torch.zeros(local.shape, dtype=local.dtype) for local in dst.locals(rank)}
        for delivery in deliver(found, filled(src, hf)[rank], group=dist.group.WORLD, deadline_s=30, staging=staging):
            with delivery:
                for transfer, values in delivery.parts:
                    inside = values.untyped_storage().data_ptr() in buffers
                    assert inside, "copies that stay on the rank come through the inbox too: an engine reads them there"
                    view(received[transfer.dst_local], transfer.dst_piece, transfer.rect).copy_(values)
        expected = filled(dst, hf)[rank]
        assert all(same(received[key], expected[key].nan_to_num(0.0)) for key in expected)
    assert staging.num_bytes <= 4 * BUCKET_BYTES


def test_buffers_serve_one_pass_after_another() -> None:
    run_ranks(4, reuse)


def drain(stream: Iterator[Delivery]) -> None:
    for delivery in stream:
        delivery.release()


def stay_away(rank: int) -> str:
    """Rank 1 takes part in two buckets, then sleeps."""
    src, _, found = make("llama", "engines of 2", 2, 1, 1)
    sources = filled(src, random_hf(src.model, torch.bfloat16))[rank]
    stream = deliver(found, sources, group=dist.group.WORLD, deadline_s=1.0)
    if rank == 1:
        next(stream).release()
        time.sleep(4)
        return ""
    start = time.monotonic()
    with pytest.raises(DeadlineError) as error:
        drain(stream)
    assert time.monotonic() - start < 3
    return str(error.value)


def test_a_rank_that_stops_coming_is_a_deadline_with_the_buckets_name() -> None:
    message = run_ranks(2, stay_away)[0]
    assert message.startswith("wait 'weights bucket 3 of")
    assert "rank 0 waited longer than 1 s" in message


def die(rank: int) -> None:
    """Rank 1 is killed while a bucket travels: rank 0 says so at once, long before its deadline."""
    src, _, found = make("llama", "engines of 2", 2, 1, 1)
    stream = deliver(found, filled(src, random_hf(src.model, torch.bfloat16))[rank], group=dist.group.WORLD, deadline_s=20.0)
    next(stream).release()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"weights bucket \d+ of"):
        drain(stream)
    assert time.monotonic() - start < 15


def test_a_rank_that_is_killed_is_an_error_on_its_peers_and_not_a_hang() -> None:
    with pytest.raises(RankError) as error:
        run_ranks(2, die)
    assert error.value.tracebacks.keys() == {1}, str(error.value)


def alone(rank: int) -> None:
    """One rank: first plans that are not for it, then one in which nothing has to travel."""
    model, group = model_of("llama, tied"), dist.group.WORLD
    src = MegatronLayout.even(model, tp=2, dtype=torch.float32)
    dst = HFLayout.of(model, dtype=torch.float32, ranks=2, holders=(0,))
    with pytest.raises(GeometryError, match="another world"):
        next(iter_buckets(plan(src, dst, whole_tensors=True), {}, group=group, deadline_s=1.0))
    hf, src = random_hf(model), MegatronLayout.even(model, tp=1, dtype=torch.float32)
    dst = HFLayout.of(model, dtype=torch.float32, ranks=1, holders=(0,))
    found = plan(src, dst, bucket_bytes=5000, whole_tensors=True)
    received: dict[str, Tensor] = {}
    with patch.object(dist, "all_to_all_single", side_effect=AssertionError("nothing had to travel")):
        for bucket in iter_buckets(found, filled(src, hf)[0], group=group, deadline_s=1.0):
            received |= bucket
    assert received.keys() == hf.keys()
    assert all(same(received[key], hf[key]) for key in hf)
    with pytest.raises(GeometryError, match="one slot for what arrives"):
        Staging(found, 0, device=torch.device("cpu"), slots=1)


def test_one_rank_copies_and_refuses_a_plan_for_two() -> None:
    run_ranks(1, alone)
