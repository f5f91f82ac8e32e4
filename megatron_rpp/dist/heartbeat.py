"""Heartbeats of all ranks over the run's store, so that a silent rank is named within `run.deadline_s`, whatever the others do.

Each rank writes its beat. Rank 0 reads them all and writes a table of who is doing what, and who has been silent for how long; the
others read the table. So a beat costs each rank two requests, and rank 0 one more for every rank that has not joined.
Rank 0 itself is watched by all: its table must change, and the store, which it hosts unless torchrun does, must answer.
No clock is compared with another host's: silence is counted on the reader's own clock, from the last change that it saw.
All requests are made by a thread of their own on a connection of their own, because a request to a store whose host is stopped
does not return. `check` and `describe` only look at what that thread has found.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from megatron_rpp.dist import activity, leaving, watch
from megatron_rpp.dist.deadline import as_lost_peer, watch_peers
from megatron_rpp.dist.store import run_store
from megatron_rpp.dist.watch import SILENT_FRAC, beat_every_s
from megatron_rpp.errors import DeadlineError, RppError

MOST_NAMED = 5  # peers in one message
LOST_S = 3.0  # from a broken connection to the error: at the end of a run rank 0 may be gone a moment before another rank has closed
JOINING = "joining the run"  # a rank that has not beaten yet


@dataclass(slots=True)
class Sight:
    """What is known of one rank. silent_s: since its last beat; elapsed_s: how long it had been at `doing` then. Units: seconds."""

    rank: int
    silent_s: float
    doing: str
    elapsed_s: float

    @property
    def is_silent(self) -> bool:
        """Worth a word in a message; a beat may be a little old."""
        return self.silent_s > 10.0

    def __str__(self) -> str:
        seen = f", silent for {self.silent_s:.1f} s" if self.is_silent else ""
        return f"rank {self.rank}: {self.doing} for {self.elapsed_s:.1f} s{seen}"


class Heartbeats:
    """This rank's beat, and its sight of the others. Between `start` and `close`.

    store: shared by all ranks; it is cloned, so that nobody waits for a request of another thread.
    """

    def __init__(self, store: Store, rank: int, size: int, *, deadline_s: float) -> None:
        """Units: deadline_s in seconds."""
        self.rank, self._size, self._deadline_s = rank, size, deadline_s
        self._store = PrefixStore("heartbeat", store.clone())
        self._store.set_timeout(timedelta(seconds=deadline_s))
        self._limit_s = SILENT_FRAC * deadline_s
        self._closed = threading.Event()
        self._lost: str | None = None  # what the store said when its connection broke
        self._refused: RppError | None = None  # a store of our own may refuse a value
        now = time.monotonic()
        self._answered = self._checked = now
        self._seen: dict[int, tuple[str, float]] = {peer: ("", now) for peer in range(size)}  # beat, when it changed; rank 0's
        self._table = {peer: Sight(peer, 0.0, JOINING, 0.0) for peer in range(size)}

    def start(self) -> None:
        """Begin to beat."""
        threading.Thread(target=self._run, name="heartbeats", daemon=True).start()

    def close(self) -> None:
        """No more beats, and no more errors. All ranks close together: to the others, one that closes first falls silent."""
        self._closed.set()

    def _run(self) -> None:
        count = 0
        try:
            while not self._closed.is_set():
                count += 1
                doing, elapsed_s = activity.current()
                self._store.set(f"beat/{self.rank}", json.dumps([count, elapsed_s, doing]))
                if self.rank == 0:
                    self._read_beats()
                    self._store.set("table", json.dumps([count, [asdict(sight) for sight in self._table.values()]]))
                else:
                    self._read_table()
                self._answered = time.monotonic()
                self._closed.wait(beat_every_s(self._deadline_s))
        except RppError as error:
            self._refused = error
        except (RuntimeError, ValueError) as error:  # torch's stores raise both
            self._lost = str(error).partition("\n")[0]

    def _read_beats(self) -> None:
        joined = [peer for peer in range(self._size) if self._seen[peer][0] or self._store.check([f"beat/{peer}"])]
        beats = dict(zip(joined, self._store.multi_get([f"beat/{peer}" for peer in joined]), strict=True))
        for peer in range(self._size):
            beat = beats.get(peer, b"").decode()
            if beat != self._seen[peer][0]:
                self._seen[peer] = beat, time.monotonic()
            _, elapsed_s, doing = json.loads(beat) if beat else (0, 0.0, JOINING)
            self._table[peer] = Sight(peer, time.monotonic() - self._seen[peer][1], doing, elapsed_s)

    def _read_table(self) -> None:
        if not (self._seen[0][0] or self._store.check(["table"])):
            return
        beat = self._store.get("table").decode()
        if beat != self._seen[0][0]:
            self._seen[0] = beat, time.monotonic()
            self._table = {row["rank"]: Sight(**row) for row in json.loads(beat)[1]}

    def check(self) -> RppError | None:
        """The error that names a silent rank; None while all beat. Never waits."""
        now = time.monotonic()
        if now - self._checked > 0.25 * self._limit_s:
            self._forgive(now)  # it was this process that stood still
        self._checked = now
        if self._closed.is_set():
            return None
        if self._refused is not None:
            return self._refused
        if self._lost is not None and now - self._answered > LOST_S:
            how = f"the store, which it hosts unless torchrun does, broke the connection: {self._lost}"
            return self._error(self._table[0], how, is_gone=True)
        is_answering = now - self._answered <= self._limit_s
        if self.rank == 0 and not is_answering:
            return self._no_store(now - self._answered)
        if self.rank != 0 and now - self._seen[0][1] > self._limit_s:
            how = "no heartbeat came" if is_answering else "the store, which it hosts unless torchrun does, does not answer"
            return self._error(replace(self._table[0], silent_s=now - self._seen[0][1]), how)
        silent = [sight for sight in self._table.values() if sight.rank != self.rank and sight.silent_s > self._limit_s]
        return self._error(max(silent, key=lambda sight: sight.silent_s)) if silent else None

    def _forgive(self, now: float) -> None:
        self._answered = max(self._answered, now)
        self._seen = {peer: (beat, now) for peer, (beat, _) in self._seen.items()}
        for sight in self._table.values():
            sight.silent_s = 0.0

    def _error(self, silent: Sight, how: str = "no heartbeat came", *, is_gone: bool = False) -> DeadlineError:
        return DeadlineError(
            f"rank {silent.rank} is gone" if is_gone else f"rank {silent.rank} has been silent for {silent.silent_s:.1f} s",
            where=f"rank {self.rank}, {activity.current()[0]}",
            expected=f"a heartbeat of rank {silent.rank} every {beat_every_s(self._deadline_s):g} s",
            got=f"{how}; the last one said: {silent.doing} for {silent.elapsed_s:.1f} s",
            fix=f"look at the host and the log of rank {silent.rank}: its process is stopped, swapped out, or gone; "
            "raise run.deadline_s if such a pause is normal here",
        )

    def _no_store(self, silent_s: float) -> DeadlineError:
        return DeadlineError(
            f"the store of the run has not answered for {silent_s:.1f} s",
            where=f"rank {self.rank}, {activity.current()[0]}",
            fix="where torchrun started the ranks, its agent hosts the store: look at that process",
        )

    def describe(self, ranks: tuple[int, ...]) -> str:
        """What some ranks were last seen to do, those first that have been silent or at it the longest; for error messages."""
        known = [self._table[rank] for rank in ranks if rank in self._table]
        sights = sorted(known, key=lambda sight: (-sight.silent_s if sight.is_silent else 0.0, -sight.elapsed_s))
        named = "; ".join(str(sight) for sight in sights[:MOST_NAMED])
        return named + (f"; and {len(sights) - MOST_NAMED} more" if len(sights) > MOST_NAMED else "")


@contextmanager
def watching_peers(rank: int, size: int, *, deadline_s: float) -> Iterator[None]:
    """Inside the block this rank beats in the store of the default process group, and its watch ends it when a peer is silent.

    An error that leaves the block is reported first, see `reported`. Collective: all ranks must be done with each other before they
    leave the block well. Units: deadline_s in seconds.
    """
    if size == 1:
        with reported(rank):
            yield
        return
    heartbeats = Heartbeats(run_store(), rank, size, deadline_s=deadline_s)
    heartbeats.start()
    watch_peers(heartbeats.describe)
    try:
        with watch.asking(heartbeats.check), reported(rank):
            yield
    finally:
        heartbeats.close()
        watch_peers(None)


@contextmanager
def reported(rank: int) -> Iterator[None]:
    """An error that leaves the block is reported before anything outside of the block is closed; see leaving.py.

    An error of a collective that only says that a peer is gone becomes a DeadlineError. Raises: DeadlineError.
    """
    try:
        yield
    except BaseException as error:
        lost = as_lost_peer(error, rank)
        leaving.tell(lost or error)
        if lost is not None:
            raise lost from error
        raise
