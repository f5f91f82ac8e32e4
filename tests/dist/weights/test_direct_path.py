"""The direct path between a policy of four ranks and its engines: who packs for whom, what travels, and what a failure does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_rpp import delivery
from megatron_rpp.config.schema import Config, Data, Parallel, Rollout
from megatron_rpp.config.schema import Model as ModelSettings
from megatron_rpp.delivery import DirectPath
from megatron_rpp.dist.groups import host_group
from megatron_rpp.dist.layout import engine_group, engine_groups
from megatron_rpp.errors import DeadlineError, EngineError
from megatron_rpp.rollout import device_memory
from megatron_rpp.rollout.device_memory import DeviceOutbox, Inbox
from megatron_rpp.weights.devices import kept_bytes
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.dist.ranks import run_ranks
from tests.dist.weights.engine_process import EngineProcess
from tests.dist.weights.live_models import live_of
from tests.dist.weights.test_transport import Wire
from tests.sglang.shared_driver import UUID, SharedDriver
from tests.unit.weights.models import CONFIGS, filled, model_of, random_hf, write_source

NAME, PARALLEL = "llama", Parallel(tp=2, pp=2)
BUCKET_BYTES = 3000
DEADLINE_S = 30.0


def layouts(tp: int, places: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[MegatronLayout, SGLangLayout]:
    model = model_of(NAME)
    return MegatronLayout.even(model, tp=2, pp=2, dtype=torch.float32), SGLangLayout(
        model, tp, torch.float32, engines=4 // tp, places=places
    )


def open_direct(
    rank: int, tp: int, places: tuple[int, ...] = (0, 1, 2, 3), deadline_s: float = DEADLINE_S
) -> tuple[DirectPath, EngineProcess | None]:
    """The path of a rank, and its engine where it leads one."""
    src, target = layouts(tp, places)
    live, mine = live_of(src, PARALLEL), engine_group(rank, tp, 4 // tp)
    engine = EngineProcess(target) if mine.leader == rank else None
    peers = host_group([group.ranks for group in engine_groups(tp, 4 // tp)])
    return DirectPath(live, engine, mine, target, peers=peers, bucket_bytes=BUCKET_BYTES, deadline_s=deadline_s), engine


def expected(tp: int) -> list[dict[str, torch.Tensor]]:
    _, target = layouts(tp)
    return filled(target, random_hf(target.model))[:tp]


def send_in_order(rank: int, places: tuple[int, ...]) -> int:
    """Bytes that this rank put on the wire; the leader's engine of four ranks holds the policy.

    First through memory that the engine opens, as on a GPU, then through the host's.
    """
    wire, reader = Wire(), SharedDriver()
    with patch.object(delivery, "open_outbox", lambda device, warn: DeviceOutbox(SharedDriver())):
        path, engine = open_direct(rank, 4, places)
    with patch.object(device_memory, "_inbox", Inbox({UUID: reader}.__getitem__)):
        path.send(1)
        path.send(2)
    assert not path._outbox._spill.any(), "nothing was copied on the way: the engine reads where it arrived"
    assert reader.opened == (12 if engine is not None else 0), "of each of four ranks two slots and the outbox's own, for both passes"
    assert engine is None or engine.holds(expected(4))
    path, engine = open_direct(rank, 4, places)
    with patch.object(dist, "all_to_all_single", wire):
        path.send(1)
    assert engine is None or engine.holds(expected(4))
    return wire.sent


def test_the_order_that_a_run_chooses_for_its_engine_moves_fewer_bytes_and_leaves_the_same_weights(tmp_path: Path) -> None:
    """TP2 x PP2 -> TP4: as the ranks come two of them hold nothing of their engine rank's but the norms."""
    from megatron_rpp.engines import places_of  # with Megatron, which the ranks do without

    cfg = Config(
        model=ModelSettings(hf=write_source(tmp_path / "hf", CONFIGS[NAME]), dtype="float32"),
        data=Data(train=tmp_path),
        parallel=PARALLEL,
        rollout=Rollout(tp=4),
    )
    places = places_of(cfg, engine_group(0, 4, 1), 1)
    assert places == (0, 2, 1, 3)
    assert engine_group(4, 4, 2).local_ids((4, 6, 5, 7), local_rank=0) == places, "CUDA_VISIBLE_DEVICES of the same engine elsewhere"
    moved, moved_plainly = sum(run_ranks(4, send_in_order, places)), sum(run_ranks(4, send_in_order, (0, 1, 2, 3)))
    assert moved < 0.8 * moved_plainly
    (kept, _), (kept_plainly, _) = (kept_bytes(*layouts(4, order), (0, 1, 2, 3)) for order in (places, (0, 1, 2, 3)))
    assert moved_plainly - moved == pytest.approx(kept - kept_plainly, rel=0.02)  # messages are rounded up to 8 bytes


class Gathers:
    """Counts gathers over the whole world."""

    def __init__(self) -> None:
        self.calls, self._gather = 0, dist.all_gather

    def __call__(self, *args: Any, group: dist.ProcessGroup, **rest: Any) -> Any:
        self.calls += dist.get_world_size(group) == dist.get_world_size()
        return self._gather(*args, group=group, **rest)


def fail(number: int) -> None:
    if number == 3:
        raise EngineError("it fell over", where="engine-1")


def failures(rank: int) -> tuple[int, str, str]:
    """Two engines of two ranks. One fails under its third bucket, then one rank cannot pack its second; then all goes well."""
    path, engine = open_direct(rank, 2)
    gathers = Gathers()
    if rank == 2:
        engine.before_load = fail
    with pytest.raises(EngineError) as first, patch.object(dist, "all_gather", gathers):
        path.send(1)
    loads = engine.num_loads if engine is not None else 0
    real_pack, packs = path._outbox.pack, []

    def refuse(bucket: Any) -> Any:
        packs.append(bucket)
        if len(packs) == 2:
            raise EngineError("no memory", where="outbox")
        return real_pack(bucket)

    if rank == 2:
        engine.before_load = lambda number: None
    if rank == 3:
        path._outbox.pack = refuse
    with pytest.raises(EngineError) as second:
        path.send(2)
    path._outbox.pack = real_pack
    path.send(3)
    assert engine is None or engine.holds(expected(2))
    assert gathers.calls == 6, "the plans compared, the update begun, its errors shared; two gathers each, however many buckets"
    return loads, str(first.value), str(second.value)


def test_an_engine_that_fails_half_way_is_an_error_on_all_ranks_once_the_exchange_is_over() -> None:
    loads, first, second = zip(*run_ranks(4, failures), strict=True)
    assert loads[0] > 10, "the other engine goes on: the exchange does"
    assert loads[2] == 3
    assert all("it fell over" in message for message in first)
    assert all("failed on rank 2" in message for message in (first[0], first[1], first[3]))
    assert all("no memory" in message for message in second)
    assert all("failed on rank 3" in message for message in second[:3])


WAIT_S = 1.0
LATE_S = 3.0


def late_on(call: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes far too long on one of its calls."""
    calls = []

    def late(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            time.sleep(LATE_S)
        return work(*args)

    return late


def wait_for(rank: int, who: int, where: str) -> tuple[str, float]:
    """What each rank says of the one that is late, and after how long."""
    path, engine = open_direct(rank, 2, deadline_s=WAIT_S)
    if rank == who and where == "pack":
        path._outbox.pack = late_on(3, path._outbox.pack)
    if rank == who and where == "load":
        engine.before_load = late_on(3, engine.before_load)
    start = time.monotonic()
    # The late one finds its peers gone, or what they had packed.
    with pytest.raises((DeadlineError, OSError) if rank == who else DeadlineError) as error:
        path.send(1)
    return str(error.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("who", "where", "peer", "others"),
    [
        (1, "pack", "weights bucket 3, where it lies", "weights bucket 5 of"),  # bucket 4 was under way
        (2, "load", "weights bucket 3, the engine's copy", "weights bucket 5 of"),
    ],
)
def test_a_rank_that_is_late_is_a_deadline_that_names_the_bucket_on_every_other(who: int, where: str, peer: str, others: str) -> None:
    answers = run_ranks(4, wait_for, who, where)
    team = engine_group(who, 2, 2).ranks
    for rank, (message, seconds) in enumerate(answers):
        if rank != who:
            assert message.startswith(f"wait '{peer if rank in team else others}"), f"rank {rank}: {message}"
            assert seconds < WAIT_S + 2
