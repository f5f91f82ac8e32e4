"""Who owns the accelerator's memory, and who holds which weights.

Colocated: the policy and the engine live on the same devices and take turns. `with place.rollout():` gives the memory to
the engine, `with place.training():` to the trainer; `publish` moves the policy's weights into every engine. Where the
device has no memory of its own to hand over (CPU), entering a phase only checks that the phases do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from megatron_rpp.delivery import WeightPath
from megatron_rpp.dist.activity import doing
from megatron_rpp.dist.agreement import Failure, attempt, raise_together, share_errors
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import RppError, StaleWeightsError
from megatron_rpp.mcore.model import MegatronModel
from megatron_rpp.rollout.engine import Engine

# What a fresh engine mends. A peer that does not come, or numbers that are not finite, are no engine's fault.
_MENDED_BY_A_RESTART = {"EngineError", "StaleWeightsError"}

Phase = Literal["idle", "rollout", "training", "publish"]


class Colocated:
    """The models that are trained and the engines on the same devices, in turns.

    trained: the policy, and a critic where there is one. engine: None on ranks that lead no engine; path: the way into them.
    """

    def __init__(
        self,
        trained: Sequence[MegatronModel],
        engine: Engine | None,
        path: WeightPath,
        groups: Groups,
        *,
        deadline_s: float,
        start_deadline_s: float = 600.0,
        warn: Callable[[str], None] = lambda text: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        """on_restart: called on every rank once the engines run anew; it may be collective."""
        self._groups, self._deadline_s, self._start_s, self._warn = groups, deadline_s, start_deadline_s, warn
        self._trained, self._engine, self._path, self._on_restart = trained, engine, path, on_restart
        self._phase: Phase = "idle"
        self.version = -1  # what every engine holds; -1 before the first publish

    @contextmanager
    def _enter(self, phase: Phase) -> Iterator[None]:
        assert self._phase == "idle", f"{phase} entered inside {self._phase}"
        self._phase = phase
        try:
            with doing(phase):
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
            for model in self._trained:
                model.wake()
            try:
                yield
            finally:
                self.sleep()

    def sleep(self) -> None:
        """The trainer frees what it alone needs. `training` ends so; before the first roll-out there was none."""
        for model in self._trained:
            model.sleep()

    def publish(self, *, version: int) -> None:
        """Every engine holds exactly the policy's weights and is stamped `version`, or the run stops on all ranks.

        Order: engine weights back on the device, begin, buckets, end, then the key-value cache: so weights, staging and
        cache are never resident together more than they must be. An engine whose update was left halfway is dead; all are
        then started anew and the weights sent again, once.
        Raises: EngineError, DeadlineError.
        """
        with self._enter("publish"):
            self._on_engine("make room for the new weights", lambda engine: engine.resume("weights"))
            error, failures = self._send(version)
            # Engines that never took any weights would fail again: then the layout is wrong.
            if failures and self.version >= 0 and {failure.kind for failure in failures} <= _MENDED_BY_A_RESTART:
                self._warn(f"{failures[0].as_error(f'publish version {version}')}\n  starting the engines anew, once")
                self._on_engine("start the engines anew", lambda engine: engine.restart(self._start_s), longest_s=self._start_s)
                self._on_restart()
                error, failures = self._send(version)
            if failures:
                raise error or failures[0].as_error(f"publish version {version}")
            self._on_engine("make room for the key-value cache", lambda engine: engine.resume("kv_cache"))
        self.version = version

    def _send(self, version: int) -> tuple[RppError | None, tuple[Failure, ...]]:
        """One attempt: this rank's error, and those of all ranks. Where one failed, every engine is dead: all were in the update."""
        error = attempt(lambda: self._path.send(version))
        what = f"publish version {version}"
        return error, share_errors(error, groups=self._groups, what=what, deadline_s=self._deadline_s)

    def _on_engine(self, what: str, call: Callable[[Engine], object], *, longest_s: float = 0.0) -> None:
        error = None if self._engine is None else attempt(lambda: call(self._engine))
        raise_together(error, groups=self._groups, what=what, deadline_s=longest_s + self._deadline_s)
