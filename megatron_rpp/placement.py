"""Who owns the accelerator's memory, and who holds which weights.

Colocated: the policy and the engine live on the same devices and take turns. `with place.rollout():` gives the memory to
the engine, `with place.training():` to the trainer; `publish` moves the policy's weights into every engine. Where the
device has no memory of its own to hand over (CPU), entering a phase only checks that the phases do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from megatron_rpp.config.schema import Config
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import EngineError, RppError, StaleWeightsError
from megatron_rpp.mcore.policy import Policy
from megatron_rpp.rollout.generate import Rollouts
from megatron_rpp.weights.gather import HfGather

Phase = Literal["idle", "rollout", "training", "publish"]


def raise_together(error: RppError | None, *, groups: Groups, what: str, deadline_s: float) -> None:
    """Every rank learns of any rank's error and stops with the same message, so that nobody waits for a peer that left.

    Raises: the local error where there is one; otherwise EngineError with the first failing rank's message.
    """
    found = gather_objects(None if error is None else (type(error).__name__, str(error)), group=groups.world_cpu, name=what, deadline_s=deadline_s)
    if error is not None:
        raise error
    for rank, report in enumerate(found):
        if report is not None:
            raise EngineError(f"{what} failed on rank {rank}: {report[1]}", fix=f"see logs/rank-{rank}.log in the run directory")


class Colocated:
    """Policy and engines on the same devices, in turns."""

    def __init__(self, cfg: Config, groups: Groups, policy: Policy, rollouts: Rollouts) -> None:
        self._deadline_s = cfg.run.deadline_s
        self._groups, self._policy, self._rollouts = groups, policy, rollouts
        self._gather = HfGather.open(policy, groups, cfg)
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
        """The engine owns the memory: the trainer's gradients are gone and its optimiser state is on the host."""
        if self.version < 0:
            raise StaleWeightsError("the engines hold no published weights", fix="call publish(version) before the first roll-out")
        with self._enter("rollout"):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """The trainer owns the memory: key-value cache and engine weights are released, then the optimiser comes back."""
        with self._enter("training"):
            self._on_leaders("release engine memory", self._rollouts.release)
            self._policy.wake()
            try:
                yield
            finally:
                self._policy.sleep()

    def publish(self, *, version: int) -> None:
        """Every engine holds exactly the policy's weights and is stamped `version`, or the run stops on all ranks.

        Order: engine weights back on the device -> begin -> buckets -> end(version) -> key-value cache back. The
        cache comes last so that weights, staging and cache are never resident together.
        """
        with self._enter("publish"):
            self._on_leaders("begin the weight update", self._rollouts.begin_update)
            error: RppError | None = None
            for bucket in self._gather.buckets():  # collective: every rank walks all buckets, whatever fails
                if error is None and bucket and self._rollouts.is_leader:
                    error = _attempt(self._rollouts.load, bucket)
            raise_together(error, groups=self._groups, what="load weights into the engine", deadline_s=self._deadline_s)
            self._on_leaders("end the weight update", lambda: self._rollouts.end_update(version))
        self.version = version

    def _on_leaders(self, what: str, call) -> None:
        error = _attempt(call) if self._rollouts.is_leader else None
        raise_together(error, groups=self._groups, what=what, deadline_s=self._deadline_s)


def _attempt(call, *args) -> RppError | None:
    try:
        call(*args)
    except RppError as error:
        return error
    return None
