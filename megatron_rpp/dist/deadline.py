"""Named waits. Nothing in this project waits without a name, a limit, and a word on what it waited for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.distributed import Store

from megatron_rpp.errors import DeadlineError

# What torch's stores and process groups say when one of their own waits ran out, or when the peer on the other side went
# away because its wait ran out first. They share no exception type.
_TIMED_OUT = re.compile(r"timed? ?out|timeout|waited \d+ ?ms", re.IGNORECASE)
_PEER_LEFT = re.compile(r"connection (closed|reset|refused)|broken pipe|socket closed", re.IGNORECASE)


class Heartbeat:
    """The last sign of life of each process, in a torch store, so that a wait that ends badly can say who went quiet where.

    Beats are stamped with the wall clock of the process that beats; an age is therefore as exact as the hosts' clocks.
    Units: ages in seconds.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self.rank = rank

    def beat(self, phase: str) -> None:
        """Says that this process has just entered `phase`."""
        self._store.set(self._key(self.rank), f"{time.time()!r} {phase}")

    def last(self, rank: int) -> tuple[float, str] | None:
        """(age in seconds, phase) of a peer's last beat; None when it never beat."""
        if not self._store.check([self._key(rank)]):
            return None
        stamp, phase = self._store.get(self._key(rank)).decode().split(" ", 1)
        return time.time() - float(stamp), phase

    def describe(self, ranks: tuple[int, ...]) -> str:
        """One phrase for each rank, for an error message."""
        phrases = []
        for rank in ranks:
            seen = self.last(rank)
            phrases.append(f"rank {rank} never beat" if seen is None else f"rank {rank} in '{seen[1]}' {seen[0]:.1f} s ago")
        return "; ".join(phrases)

    @staticmethod
    def _key(rank: int) -> str:
        return f"heartbeat/{rank}"


@dataclass(slots=True)
class Deadline:
    """A wait's name, its limit and its clock. Made by `deadline(...)`.

    Units: limit_s, remaining_s, elapsed_s in seconds of the monotonic clock.
    """

    name: str
    limit_s: float
    rank: int | None = None
    waiting_for: str | None = None
    heartbeat: Heartbeat | None = None
    peers: tuple[int, ...] = ()
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def remaining_s(self) -> float:
        """Never negative, so that it can be handed to any call that takes a timeout."""
        return max(0.0, self.limit_s - self.elapsed_s)

    def check(self) -> None:
        """Raises DeadlineError once the limit has passed."""
        if self.elapsed_s >= self.limit_s:
            raise self.error()

    def poll(self, is_done: Callable[[], bool], every_s: float = 0.05) -> None:
        """Waits until `is_done()`, asking every `every_s` seconds.

        Raises: DeadlineError when the limit passes first.
        """
        while not is_done():
            self.check()
            time.sleep(min(every_s, self.remaining_s))

    def error(self, *, lost_peer: bool = False) -> DeadlineError:
        """The error of this wait, built when it is needed: who waited, for what, how long, and who was last seen where."""
        who = "this process" if self.rank is None else f"rank {self.rank}"
        got = f"{'a connection that broke' if lost_peer else 'nothing'} after {self.elapsed_s:.1f} s"
        if self.heartbeat is not None and self.peers:
            got += f"; last signs of life: {self.heartbeat.describe(self.peers)}"
        return DeadlineError(
            f"{who} lost a peer it waited for" if lost_peer else f"{who} waited longer than {self.limit_s:g} s",
            where=f"wait '{self.name}'",
            expected=self.waiting_for,
            got=got,
            fix="look at the first error in the logs of the other ranks; raise run.deadline_s only if the work is really that slow",
        )


@contextmanager
def deadline(
    name: str,
    limit_s: float,
    *,
    rank: int | None = None,
    waiting_for: str | None = None,
    heartbeat: Heartbeat | None = None,
    peers: tuple[int, ...] = (),
) -> Iterator[Deadline]:
    """Names a wait and bounds it: `with deadline("gather groups", 60) as wait: work.wait(timedelta(seconds=wait.remaining_s))`.

    It cannot interrupt a call that takes no timeout of its own: hand `wait.remaining_s` to whatever blocks, or use
    `wait.poll`. Errors of a timeout that leave the block (TimeoutError, and those of torch's stores and groups, which are
    plain RuntimeErrors) become a DeadlineError with this wait's name; so does a peer's vanishing after its own wait ran out.

    Units: limit_s in seconds.
    Raises: DeadlineError.
    """
    wait = Deadline(name, limit_s, rank, waiting_for, heartbeat, peers)
    try:
        yield wait
    except TimeoutError as error:
        raise wait.error() from error
    except RuntimeError as error:
        if _TIMED_OUT.search(str(error)):
            raise wait.error() from error
        if _PEER_LEFT.search(str(error)):
            raise wait.error(lost_peer=True) from error
        raise
