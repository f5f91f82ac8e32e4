"""What the processes of a run do about signals: they end with their parent, a warning to save never ends one, and ranks tidy up."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

# Slurm's warning before the time limit goes to every process of a task, whatever it is doing.
WARNING = signal.SIGUSR1
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)  # loaded before any fork: a forked child must not run the loader


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `by` when process `parent`, its parent, ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def wake_when_parent_ends() -> None:
    """Have the kernel continue this process, if it is stopped, when its parent ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own, instead of process 1."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that stop a run. One that was ignored when this process started, such as SIGHUP under nohup, is not among them."""
    return tuple(number for number in STOP if signal.getsignal(number) is not signal.SIG_IGN)


def unwind_once() -> None:
    """From here on the first signal to stop unwinds the main thread, so that engines and workers are closed in order.

    Later ones are ignored: they would interrupt the closing, and leave folders behind.
    """
    handled = stop_signals()

    def unwind(number: int, frame: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    for number in handled:
        signal.signal(number, unwind)


def hold_warning() -> None:
    """From here on a warning waits until `take_warning` asks for it; in all threads and processes started from here, too.

    It is blocked, not ignored: an ignored one that comes while the run is still loading would be lost. To be called first of
    all, because a thread that stands already would be ended by it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})


def take_warning() -> bool:
    """Whether a warning has come since the last call."""
    return signal.sigtimedwait({WARNING}, 0) is not None
