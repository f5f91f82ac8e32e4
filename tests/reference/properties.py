"""How property tests run here: the same examples every time, and no stop-watch, since the machine is shared."""

from __future__ import annotations

from hypothesis import settings

steady = settings(deadline=None, derandomize=True, max_examples=30)
