"""Two promises that every process of a run keeps: it ends with its parent, and a warning to save never ends it."""

from __future__ import annotations

import ctypes
import os
import signal

# Slurm's warning before the time limit goes to every process of a task, whatever it is doing.
WARNING = signal.SIGUSR1
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


def hold_warning() -> None:
    """From here on a warning waits until `take_warning` asks for it; in all threads and processes started from here, too.

    It is blocked, not ignored: an ignored one that comes while the run is still loading would be lost. To be called first of
    all, because a thread that stands already would be ended by it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})


def take_warning() -> bool:
    """Whether a warning has come since the last call."""
    return signal.sigtimedwait({WARNING}, 0) is not None
