"""What the main thread of this process is doing, in words: its open phases and named waits.

`deadline(...)` enters every named wait here by itself. The watch (watch.py) reads it from its own thread: for the rank's
heartbeat, and to end a wait that did not end by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Activity:
    """One activity of the main thread. limit_s: the longest that it may take; None for no limit.

    Units: started in seconds of the monotonic clock, limit_s in seconds.
    """

    name: str
    limit_s: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started


_open: list[Activity] = [Activity("starting")]  # the first one stands for the process; the main thread alone writes


@contextmanager
def doing(name: str, limit_s: float | None = None) -> Iterator[None]:
    """Inside the block the main thread is said to do `name`. Other threads may enter; what they do is not recorded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    activity = Activity(name, limit_s)
    _open.append(activity)
    try:
        yield
    finally:
        _open.remove(activity)
        if len(_open) == 1:
            _open[0] = Activity(f"after {name}")


def current() -> tuple[str, float]:
    """The open activities from the outermost to the innermost, and how long the innermost has lasted. Units: seconds."""
    entries = list(_open)
    names = dict.fromkeys(entry.name for entry in entries[1:]) or {entries[0].name: None}  # a phase inside itself is named once
    return " / ".join(names), entries[-1].elapsed_s


def overdue(slack_s: float) -> Activity | None:
    """An open activity that has lasted longer than its own limit and `slack_s` more; None when there is none."""
    late = (entry for entry in list(_open) if entry.limit_s is not None and entry.elapsed_s > entry.limit_s + slack_s)
    return next(late, None)
