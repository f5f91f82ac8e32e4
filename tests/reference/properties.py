"""How property tests run here: the same examples every time, and no stop-watch, since the machine is shared."""

from __future__ import annotations

from hypothesis import settings

steady = settings(deadline=None, derandomize=True, max_examples=30)
# For what must hold of every input: pure functions, a millisecond an example.
thorough = settings(deadline=None, derandomize=True, max_examples=2000)
