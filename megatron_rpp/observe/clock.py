"""How long the phases of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_rpp.dist.activity import doing


@dataclass(slots=True)
class StepClock:
    """Seconds of each phase of the step under way: `with clock("update"): ...`."""

    spent: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            with doing(phase):
                yield
        finally:
            name = f"{phase}_s"
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, float]:
        """The phases since the last call, and the whole as step_s."""
        now = time.monotonic()
        spent, self.spent = {**self.spent, "step_s": now - self._start}, {}
        self._start = now
        return spent
