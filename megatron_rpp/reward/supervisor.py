"""The parent of a verifier process, which ends with everything that the verifier started.

A verifier may start programs, fork, detach what it forked (setsid, a double fork), or clear its environment. All of that
stays below the supervisor in the process tree, because orphans come back to it (PR_SET_CHILD_SUBREAPER). The supervisor
waits for one of two things: its verifier ends, or a SIGTERM arrives. The pool sends one to replace the verifier, and the
kernel sends one when the pool's process ends, by SIGKILL too. Either way the supervisor kills all that is below it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from typing import NoReturn

from megatron_rpp.signals import adopt_orphans, die_with

SWEEP_S = 5.0  # the longest that killed processes may take to end
_ENDINGS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_EVENTS = {*_ENDINGS, signal.SIGCHLD}


def fork_verifier(pool_pid: int, channel_fd: int) -> None:
    """Split this process in two: the verifier, which returns, and its supervisor, which ends after the verifier.

    The supervisor ends as the verifier did: with its exit code, or by the same signal. Call it before any thread starts.
    pool_pid: the parent of this process. channel_fd: closed in the supervisor, which has no use for it.
    """
    inherited = signal.pthread_sigmask(signal.SIG_BLOCK, _EVENTS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited SIG_IGN would discard the verifier's status
    die_with(pool_pid, by=signal.SIGTERM)
    adopt_orphans()
    supervisor = os.getpid()
    verifier = os.fork()
    if verifier == 0:
        os.setsid()  # a verifier that kills its own process group leaves the supervisor alive
        die_with(supervisor)
        signal.pthread_sigmask(signal.SIG_SETMASK, inherited)
        return
    os.close(channel_fd)
    _end_like(_watch(verifier))


def _watch(verifier: int) -> int:
    """The wait status of the verifier, once nothing is left below this process."""
    status: int | None = None
    while status is None and signal.sigwait(_EVENTS) not in _ENDINGS:
        status = _reap().get(verifier)
    ended = _kill_all_below()
    return ended.get(verifier, signal.SIGKILL) if status is None else status


def _reap() -> dict[int, int]:
    """Wait statuses of the children that have ended, by pid."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def _kill_all_below() -> dict[int, int]:
    """Kill the children, then those that they leave to us, until there are none. Returns the wait statuses.

    Only children are signaled: their numbers cannot be given to other processes, because nobody else reaps them.
    """
    ended: dict[int, int] = {}
    deadline = time.monotonic() + SWEEP_S
    while time.monotonic() < deadline:
        ended |= _reap()
        children = _children()
        if not children:
            break
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # a program with set-user-ID bit is not ours to kill
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return ended


def _children() -> list[int]:
    children = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as stat:
            parent = stat.read().rpartition(b")")[2].split()[1]  # the name of a program may hold spaces and brackets
            if int(parent) == os.getpid():
                children.append(int(pid))
    return children


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))
