"""The policy's weights on their way into the engines, by one of two paths that must leave the same bits.

gather: every leader gets whole HF tensors and the engine cuts them itself, as it does when it reads a checkpoint. Works for any
model that the engine can load; moves the whole model to every leader.
direct: every rank of an engine gets, from whichever trainer ranks hold them, exactly the slices that it keeps, and copies them
into its parameters. Each byte goes once to each GPU that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from megatron_rpp.dist.agreement import attempt, raise_together
from megatron_rpp.dist.collectives import broadcast_object, gather_objects
from megatron_rpp.dist.groups import ProcessGroup
from megatron_rpp.dist.layout import EngineGroup
from megatron_rpp.errors import RppError
from megatron_rpp.rollout.device_memory import open_outbox
from megatron_rpp.rollout.engine import Announced, Engine, Packed
from megatron_rpp.rollout.memory import Bucket
from megatron_rpp.weights.buckets import Transfer
from megatron_rpp.weights.fp8 import Fp8Pair, Narrowing, final_locals
from megatron_rpp.weights.gather import iter_hf_tensors
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.quantise import checkpoint_tensors
from megatron_rpp.weights.rect import Local
from megatron_rpp.weights.sglang_layout import SGLangLayout
from megatron_rpp.weights.shards import ShardStream
from megatron_rpp.weights.transport import Delivery

Load = TypeVar("Load")
Part = tuple[Transfer, Tensor]
LoadShards = Callable[[Sequence[Packed]], None]

ENGINE_SHARE = 0.9  # of a deadline is the engine's own


class WeightPath(Protocol):
    """One way into the engines. Collective: every rank of the world calls `send`, and all of them fail together."""

    def send(self, version: int) -> None:
        """Every engine holds exactly the policy's weights, stamped `version`. Raises: EngineError, DeadlineError; then engines are dead."""
        ...


class GatherPath:
    """Whole HF tensors to every leader, which makes FP8 of them for an engine in FP8.

    engine: this rank's, None where it leads none.
    """

    def __init__(
        self,
        live: LiveWeights,
        engine: Engine | None,
        leaders: tuple[int, ...],
        *,
        is_fp8: bool = False,
        bucket_bytes: int,
        deadline_s: float,
    ) -> None:
        self._live, self._engine, self._leaders = live, engine, leaders
        self._as_stored = checkpoint_tensors if is_fp8 else list
        self._bucket_bytes, self._deadline_s = bucket_bytes, deadline_s

    def send(self, version: int) -> None:
        with ExitStack() as update:
            engine_s = ENGINE_SHARE * self._deadline_s  # as in DirectPath
            load = _begin(update, self._engine, lambda engine: engine.update(version, deadline_s=engine_s), self._live, self._deadline_s)
            error: RppError | None = None
            for bucket in iter_hf_tensors(self._live, self._leaders, bucket_bytes=self._bucket_bytes, deadline_s=self._deadline_s):
                # Every rank walks all buckets, whatever fails on a leader: the exchange is collective.
                if load is not None and error is None:
                    error = attempt(lambda bucket=bucket: load(list(self._as_stored(bucket.items()))))
            raise_together(error, groups=self._live.groups, what="load weights into the engine", deadline_s=self._deadline_s)


class DirectPath:
    """Slices from the trainer's ranks to the engines' ranks, which live on the same GPUs: target.places says which on which.

    Every rank of a group has what its engine rank is to get in memory of its own; the leader tells the engine where. The exchange
    goes on to its end whatever happens to an engine, so that no rank waits for one that has given up.
    """

    def __init__(
        self,
        live: LiveWeights,
        engine: Engine | None,
        mine: EngineGroup | None,
        target: SGLangLayout,
        *,
        peers: ProcessGroup | None,
        fp8: Fp8Pair | None = None,
        bucket_bytes: int,
        deadline_s: float,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """mine: the engine group of this rank, peers: its ranks on gloo; None on a rank without one. target: who keeps what.

        fp8: both ends in FP8, for engines whose matrices are; what did not travel so is quantised by the rank that hands it over.
        """
        self._live, self._engine, self._peers, self._deadline_s = live, engine, peers, deadline_s
        ranks = mine.ranks if mine is not None else ()
        self._order = sorted(range(len(ranks)), key=lambda number: target.engine_rank(ranks[number]))  # group ranks by engine rank
        kept = target.locals if fp8 is None else partial(final_locals, fp8.target)
        self._announced = [announce(kept(ranks[number])) for number in self._order] if engine is not None else []
        self._fp8, self._narrowing = fp8, None
        self._outbox = open_outbox(next(iter(live.tensors.values())).device, warn=warn)
        ends = (target, None) if fp8 is None else (fp8.target, fp8.source)
        self._shards = ShardStream(live, *ends, bucket_bytes=bucket_bytes, deadline_s=deadline_s, empty=self._outbox.empty)

    def send(self, version: int) -> None:
        # The leader hears from its engine before its peers give up waiting for the leader.
        engine_s = ENGINE_SHARE * self._deadline_s
        with ExitStack() as update:

            def begin(engine: Engine) -> AbstractContextManager[LoadShards]:
                return engine.update_shards(version, self._announced, deadline_s=engine_s)

            load = _begin(update, self._engine, begin, self._live, self._deadline_s)
            error: RppError | None = None
            is_whole = self._peers is not None
            self._narrowing = Narrowing(self._fp8.target) if self._fp8 is not None else None
            with closing(self._shards.deliveries()) as buckets:
                for bucket in buckets:
                    with bucket:
                        if is_whole:
                            error, is_whole = self._hand_over(bucket, load)
            raise_together(error, groups=self._live.groups, what="load weights into the engine", deadline_s=self._deadline_s)

    def _hand_over(self, bucket: Delivery, load: LoadShards | None) -> tuple[RppError | None, bool]:
        """One bucket of one engine. Returns when the engine has copied it: this rank's error, and whether all its ranks are well."""
        packed: list[Packed] = []
        error = attempt(lambda: packed.append(self._outbox.pack(labelled(self._as_kept(bucket.parts)))))
        name = f"weights bucket {bucket.number + 1}"
        mine = None if error is not None else packed[0]
        found = gather_objects(mine, self._peers, name=f"{name}, where it lies", deadline_s=self._deadline_s)
        is_whole = None not in found
        if load is not None and is_whole:
            error = attempt(lambda: load([found[number] for number in self._order]))
        said = error is None and is_whole  # only the leader's counts, the first of the group
        return error, broadcast_object(said, self._peers, name=f"{name}, the engine's copy", deadline_s=self._deadline_s)

    def _as_kept(self, parts: Sequence[Part]) -> Sequence[Part]:
        return parts if self._narrowing is None else self._narrowing.take(parts)


def announce(locals_: Sequence[Local]) -> Announced:
    """Of each parameter its shape, and how many of its elements will come: all that are not padding."""
    return {local.name: (local.shape, sum(piece.rect.area for piece in local.pieces)) for local in locals_}


def labelled(parts: Sequence[Part]) -> Bucket:
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
