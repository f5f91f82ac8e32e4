"""The policy's weights on their way into the engines, by one of two paths that must leave the same bits.

gather: every leader gets whole HF tensors and the engine cuts them itself, as it does when it reads a checkpoint. Works for any
model that the engine can load; moves the whole model to every leader.
direct: every rank of an engine gets, from whichever trainer ranks hold them, exactly the slices that it keeps, and copies them
into its parameters. Each byte goes once to each GPU that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Protocol, TypeVar

from torch import Tensor

from megatron_rpp.dist.agreement import attempt, raise_together
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.layout import EngineGroup
from megatron_rpp.errors import RppError
from megatron_rpp.rollout.engine import Announced, Engine, Packed
from megatron_rpp.rollout.memory import Bucket, Outbox
from megatron_rpp.weights.buckets import Transfer
from megatron_rpp.weights.gather import iter_hf_tensors
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.rect import Local
from megatron_rpp.weights.sglang_layout import SGLangLayout
from megatron_rpp.weights.shards import ShardStream

Load = TypeVar("Load")


class WeightPath(Protocol):
    """One way into the engines. Collective: every rank of the world calls `send`, and all of them fail together."""

    def send(self, version: int) -> None:
        """Every engine holds exactly the policy's weights, stamped `version`. Raises: EngineError, DeadlineError; then engines are dead."""
        ...


class GatherPath:
    """Whole HF tensors to every leader. engine: this rank's, None where it leads none."""

    def __init__(self, live: LiveWeights, engine: Engine | None, leaders: tuple[int, ...], *, bucket_bytes: int, deadline_s: float) -> None:
        self._live, self._engine, self._leaders = live, engine, leaders
        self._bucket_bytes, self._deadline_s = bucket_bytes, deadline_s

    def send(self, version: int) -> None:
        with ExitStack() as update:
            load = _begin(update, self._engine, lambda engine: engine.update(version), self._live, self._deadline_s)
            error: RppError | None = None
            for bucket in iter_hf_tensors(self._live, self._leaders, bucket_bytes=self._bucket_bytes, deadline_s=self._deadline_s):
                # Every rank walks all buckets, whatever fails on a leader: the exchange is collective.
                if load is not None and error is None:
                    error = attempt(lambda bucket=bucket: load(list(bucket.items())))
            raise_together(error, groups=self._live.groups, what="load weights into the engine", deadline_s=self._deadline_s)


class DirectPath:
    """Slices from the trainer's ranks to the engines' ranks, which live on the same GPUs: rank r of an engine on the r-th of its group.

    Every rank of a group packs what its engine rank is to get into memory of its own; the leader tells the engine where.
    """

    def __init__(
        self,
        live: LiveWeights,
        engine: Engine | None,
        mine: EngineGroup | None,
        target: SGLangLayout,
        *,
        bucket_bytes: int,
        deadline_s: float,
    ) -> None:
        """mine: the engine group of this rank; target: who keeps what in all engines."""
        self._live, self._engine, self._mine = live, engine, mine
        self._deadline_s = deadline_s
        self._announced = [announce(target.locals(rank)) for rank in mine.ranks] if engine is not None else []
        self._shards = ShardStream(live, target, bucket_bytes=bucket_bytes, deadline_s=deadline_s)
        self._outbox = Outbox()

    def send(self, version: int) -> None:
        with ExitStack() as update:
            load = _begin(update, self._engine, lambda engine: engine.update_shards(version, self._announced), self._live, self._deadline_s)
            with closing(self._shards.deliveries()) as buckets:
                for bucket in buckets:
                    with bucket:
                        packed = self._outbox.pack(labelled(bucket.parts))
                    self._hand_over(packed, load)

    def _hand_over(self, packed: Packed, load: Callable[[Sequence[Packed]], None] | None) -> None:
        """One bucket of every rank. Returns when the engines have copied it, so that its memory can be used again."""
        gathered = gather_objects(packed, self._live.groups.world_cpu, name="where the weights lie", deadline_s=self._deadline_s)
        error = None if load is None else attempt(lambda: load([gathered[rank] for rank in self._mine.ranks]))
        raise_together(error, groups=self._live.groups, what="load weights into the engine", deadline_s=self._deadline_s)


def announce(locals_: Sequence[Local]) -> Announced:
    """Of each parameter its shape, and how many of its elements will come: all that are not padding."""
    return {local.name: (local.shape, sum(piece.rect.area for piece in local.pieces)) for local in locals_}


def labelled(parts: Sequence[tuple[Transfer, Tensor]]) -> Bucket:
    """What arrived, each rectangle under the place that it belongs to, as Engine.update_shards wants it."""
    found = []
    for transfer, values in parts:
        piece, rect = transfer.dst_piece, transfer.rect
        row, col = piece.row + rect.row - piece.rect.row, piece.col + rect.col - piece.rect.col
        found.append(((transfer.dst_local, piece.index, row, col), values))
    return found


def _begin(
    update: ExitStack,
    engine: Engine | None,
    open_update: Callable[[Engine], AbstractContextManager[Load]],
    live: LiveWeights,
    deadline_s: float,
) -> Load | None:
    """Open the update on every leader, or on none. Returns how this rank hands over a bucket; None where it leads no engine."""
    opened: list[Load] = []
    error = None if engine is None else attempt(lambda: opened.append(update.enter_context(open_update(engine))))
    raise_together(error, groups=live.groups, what="begin the weight update", deadline_s=deadline_s)
    return opened[0] if opened else None
