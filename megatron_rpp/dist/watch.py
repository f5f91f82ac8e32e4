"""The watch: a thread of every rank that beats, and that ends the rank when its main thread cannot.

A beat says that the process runs, and what its main thread is doing since when. A process that is stopped (SIGSTOP), swapped out,
or frozen with its virtual machine has no thread that beats: its peers (heartbeat.py) and its launcher miss it within
`run.deadline_s`. A process that beats is alive, however long its work takes. So a long roll-out is never taken for silence.
A main thread that is stuck while this thread beats is found in three ways:
  - it is in a named wait: the wait's own limit has passed, and the call did not return at it (a store whose host is stopped);
  - the kernel holds it in one uninterruptible call (state D: a dead NFS server, a failing disk) for all of `run.deadline_s`;
  - anything else: its peers wait for it in a named wait of their own, whose error says what this rank is doing since when.
Nothing else bounds work that has no limit of its own, such as loading 70B parameters.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.dist import activity, leaving
from megatron_rpp.errors import DeadlineError, RppError
from megatron_rpp.signals import STOP

Check = Callable[[], RppError | None]

_BEAT_BYTES = 1024
STOP_S = 4.0  # from a signal to stop to the end of this rank, where the main thread does not act on it
SILENT_FRAC = 0.8  # of the deadline, after which a rank that does not beat is given up: with two beats below the deadline


def beat_every_s(deadline_s: float) -> float:
    """Units: seconds between two beats of a rank."""
    return min(2.0, deadline_s / 20)


class Watch:
    """Made by `start`. peers: asked at each beat whether the other ranks beat, once they have joined; see `asking`."""

    def __init__(self, rank: int, deadline_s: float, beat_file: Path | None) -> None:
        self.rank, self.deadline_s = rank, deadline_s
        self._beat_file = None if beat_file is None else BeatFile(beat_file)
        self.peers: Check | None = None
        self._stuck = Stuck(deadline_s)
        self._wake, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        self._stopped_by: tuple[int, float] | None = None  # signal, when

    def start(self) -> None:
        """Begin to beat. Call it from the main thread, after the handlers of signals stand."""
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a signal to a forked child is not for this rank
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        every_s = beat_every_s(self.deadline_s)
        while True:
            if self._beat_file is not None:
                self._beat_file.write(is_starting=self.peers is None)
            self._end_if_due()
            error = None if leaving.is_ending() else self._error()
            if error is not None:
                leaving.leave(leaving.tell(error))
            self._sleep(every_s)

    def _error(self) -> RppError | None:
        """Why this rank cannot go on; None where it can. What is asked here must not block."""
        peers = self.peers  # the main thread may take it away
        return self._check_waits() or self._stuck.check() or (peers() if peers is not None else None)

    def _sleep(self, seconds: float) -> None:
        if leaving.is_ending() or self._stopped_by is not None:
            seconds = min(seconds, 0.2)
        readable, _, _ = select.select([self._wake], [], [], seconds)
        for number in self._wake.recv(64) if readable else b"":
            if number in STOP and self._stopped_by is None:
                self._stopped_by = number, time.monotonic()

    def _end_if_due(self) -> None:
        """Leave in the place of a main thread that does not react to a signal, or does not come to the end of its unwinding."""
        code = leaving.overdue_code()
        if code is not None:
            leaving.leave(code)
        if self._stopped_by is not None and time.monotonic() - self._stopped_by[1] > STOP_S:
            leaving.leave(128 + self._stopped_by[0])

    def _check_waits(self) -> DeadlineError | None:
        late = activity.overdue(slack_s=1.0 + 2 * beat_every_s(self.deadline_s))
        if late is None:
            return None
        return DeadlineError(
            f"rank {self.rank} is stuck: the wait did not end at its limit of {late.limit_s:g} s",
            where=late.name,
            got=f"{activity.current()[0]} for {late.elapsed_s:.0f} s",
            fix="look at the first error in the logs of the other ranks, and at the host of rank 0",
        )


class Stuck:
    """Finds a main thread that the kernel holds in one uninterruptible call. Units: deadline_s in seconds."""

    def __init__(self, deadline_s: float, task: Path | None = None) -> None:
        """task: the thread's folder in /proc; the main thread of this process by default."""
        self._deadline_s = deadline_s
        self._task = task or Path(f"/proc/self/task/{os.getpid()}")
        self._seen: str | None = None
        self._since = 0.0

    def check(self) -> DeadlineError | None:
        """The error to end with when the thread has been in state D, without having run at all, for the whole deadline."""
        try:
            status = (self._task / "status").read_text()
        except OSError:  # no free file descriptor: the watch must go on beating
            return None
        is_held = "State:\tD" in status
        switches = " ".join(line for line in status.splitlines() if "ctxt_switches" in line)
        if not is_held or switches != self._seen:
            self._seen, self._since = (switches if is_held else None), time.monotonic()
            return None
        if time.monotonic() - self._since < self._deadline_s:
            return None
        doing, elapsed_s = activity.current()
        return DeadlineError(
            f"the main thread has been stuck in one system call for {self._deadline_s:g} s",
            where=f"{doing} for {elapsed_s:.0f} s",
            got=f"state D (uninterruptible) in {self._call()}",
            fix="look at the file systems and devices of this host (dmesg); a network file system may have lost its server",
        )

    def _call(self) -> str:
        try:
            return (self._task / "wchan").read_text().strip("0\n") or "an unnamed call"
        except OSError:
            return "an unnamed call"


_watch: Watch | None = None  # of this process


def start(rank: int, deadline_s: float, beat_file: Path | None) -> None:
    """Start the watch of this process. beat_file: the beats go there too, for our own launcher. Units: deadline_s in seconds."""
    global _watch
    _watch = Watch(rank, deadline_s, beat_file)
    _watch.start()


@contextmanager
def asking(peers: Check) -> Iterator[None]:
    """Inside the block the watch of this process asks `peers` at each beat. An error that it returns ends the rank.

    It must not block. In a process without a watch nobody asks.
    """
    if _watch is None:
        yield
        return
    _watch.peers = peers
    try:
        yield
    finally:
        _watch.peers = None


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank tells its launcher. is_starting: its peers do not watch it yet.

    Units: written in nanoseconds of the file system's clock, elapsed_s, how long it has been at `doing`, in seconds.
    """

    written: int
    is_starting: bool
    doing: str
    elapsed_s: float


class BeatFile:
    """The file into which a rank beats for its launcher. Its size stays the same: a disk that fills up must not look like silence."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, *, is_starting: bool) -> None:
        """One beat. Where the text cannot be written, the time of the file still tells that there was one."""
        text = json.dumps([is_starting, *activity.current()]).encode()[:_BEAT_BYTES]
        try:
            os.pwrite(self._fd, text.ljust(_BEAT_BYTES), 0)
        except OSError:
            os.utime(self._path)


def read_beat(path: Path) -> Beat | None:
    """The last beat in a file; None when there was none yet."""
    try:
        written, text = path.stat().st_mtime_ns, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Beat(written, *json.loads(text))
    except ValueError:  # empty, cut, or read while it was written
        return Beat(written, is_starting=True, doing="starting", elapsed_s=0.0)
