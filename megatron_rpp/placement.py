"""Who owns the accelerator's memory, and who holds which weights.

Colocated: the policy and the engine live on the same devices and take turns. `with place.rollout():` gives the memory to
the engine, `with place.training():` to the trainer; `publish` moves the policy's weights into every engine. Where the
device has no memory of its own to hand over (CPU), entering a phase only checks that the phases do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

from megatron_rpp.dist.agreement import raise_together
from megatron_rpp.errors import RppError, StaleWeightsError
from megatron_rpp.mcore.policy import Policy
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.memory import Bucket
from megatron_rpp.weights.gather import iter_hf_tensors
from megatron_rpp.weights.live import LiveWeights

Phase = Literal["idle", "rollout", "training", "publish"]
Load = Callable[[Bucket], None]


class Colocated:
    """Policy and engines on the same devices, in turns. engine: None on ranks that lead no engine; leaders: those that do."""

    def __init__(self, policy: Policy, live: LiveWeights, engine: Engine | None, leaders: tuple[int, ...], *, deadline_s: float) -> None:
        self._groups, self._deadline_s = live.groups, deadline_s
        self._policy, self._live, self._engine, self._leaders = policy, live, engine, leaders
        self._phase: Phase = "idle"
        self.version = -1  # what every engine holds; -1 before the first publish

    @contextmanager
    def _enter(self, phase: Phase) -> Iterator[None]:
        assert self._phase == "idle", f"{phase} entered inside {self._phase}"
        self._phase = phase
        try:
            yield
        finally:
            self._phase = "idle"

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """The engine owns the memory: weights and key-value cache are resident, the trainer sleeps."""
        if self.version < 0:
            raise StaleWeightsError("the engines hold no published weights", fix="call publish(version) before the first roll-out")
        with self._enter("rollout"):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """The trainer owns the memory: the engine's cache and weights go first, then the optimiser comes back."""
        with self._enter("training"):
            self._on_engine("release the engine's memory", lambda engine: engine.release("kv_cache", "weights"))
            self._policy.wake()
            try:
                yield
            finally:
                self._policy.sleep()

    def publish(self, *, version: int) -> None:
        """Every engine holds exactly the policy's weights and is stamped `version`, or the run stops on all ranks.

        Order: engine weights back on the device, begin, buckets, end, then the key-value cache: so weights, staging and
        cache are never resident together more than they must be. An engine whose update was left halfway is dead.
        Raises: EngineError, DeadlineError.
        """
        with self._enter("publish"):
            self._on_engine("make room for the new weights", lambda engine: engine.resume("weights"))
            error: RppError | None = None
            try:
                with ExitStack() as update:
                    self._send(self._begin(update, version))
            except RppError as raised:  # agreed already, or this leader's own while it closed the update
                error = raised
            raise_together(error, groups=self._groups, what=f"publish version {version}", deadline_s=self._deadline_s)
            self._on_engine("make room for the key-value cache", lambda engine: engine.resume("kv_cache"))
        self.version = version

    def _begin(self, update: ExitStack, version: int) -> Load | None:
        """Open the update session on every leader, or on none. Returns how this rank hands over a bucket."""
        opened: list[Load] = []
        self._on_engine("begin the weight update", lambda engine: opened.append(update.enter_context(engine.update(version))))
        return opened[0] if opened else None

    def _send(self, load: Load | None) -> None:
        """Every rank walks all buckets, whatever fails on a leader: the exchange is collective."""
        error: RppError | None = None
        for bucket in iter_hf_tensors(self._live, self._leaders, deadline_s=self._deadline_s):
            if load is not None and error is None:
                error = _attempt(partial(load, list(bucket.items())))
        raise_together(error, groups=self._groups, what="load weights into the engine", deadline_s=self._deadline_s)

    def _on_engine(self, what: str, call: Callable[[Engine], object]) -> None:
        error = None if self._engine is None else _attempt(lambda: call(self._engine))
        raise_together(error, groups=self._groups, what=what, deadline_s=self._deadline_s)


def _attempt(call: Callable[[], object]) -> RppError | None:
    try:
        call()
    except RppError as error:
        return error
    return None
