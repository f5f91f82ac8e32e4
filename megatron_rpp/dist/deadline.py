"""Named waits. Nothing in this project waits without a name, a limit, and a word on what it waited for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_rpp.dist.activity import current, doing
from megatron_rpp.errors import DeadlineError

# What torch's stores and process groups say when one of their own waits ran out, or when the peer on the other side went
# away because its wait ran out first. They share no exception type.
_TIMED_OUT = re.compile(r"timed? ?out|timeout|waited \d+ ?ms", re.IGNORECASE)
_PEER_LEFT = re.compile(r"connection (closed|reset|refused)|broken pipe|socket closed", re.IGNORECASE)


# What peers were last seen to do; set while this rank watches them (`watch_peers`).
_describe_peers: Callable[[tuple[int, ...]], str] | None = None


def watch_peers(describe: Callable[[tuple[int, ...]], str] | None) -> None:
    """From here on the errors of waits for peers say what `describe(ranks)` says of them; None: nothing. It must not wait."""
    global _describe_peers
    _describe_peers = describe


@dataclass(slots=True)
class Deadline:
    """A wait's name, its limit and its clock. Made by `deadline(...)`.

    Units: limit_s, remaining_s, elapsed_s in seconds of the monotonic clock.
    """

    name: str
    limit_s: float
    rank: int | None = None
    waiting_for: str | None = None
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
        if self.peers and _describe_peers is not None and (seen := _describe_peers(self.peers)):
            got += f"; last seen: {seen}"
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
    peers: tuple[int, ...] = (),
    is_work: bool = False,
) -> Iterator[Deadline]:
    """Names a wait and bounds it: `with deadline("gather groups", 60) as wait: work.wait(timedelta(seconds=wait.remaining_s))`.

    It cannot interrupt a call that takes no timeout of its own: hand `wait.remaining_s` to whatever blocks, or use
    `wait.poll`. In a rank of a run the watch (watch.py) ends the process if such a call does not return.
    Errors of a timeout that leave the block (TimeoutError, and those of torch's stores and groups, which are plain
    RuntimeErrors) become a DeadlineError with this wait's name; so does a peer's vanishing after its own wait ran out.

    is_work: the block works, and waits for peers inside that work. limit_s then bounds each of those waits, by the timeout of the
    process group, and not the block, which may take longer.
    Units: limit_s in seconds.
    Raises: DeadlineError.
    """
    wait = Deadline(name, limit_s, rank, waiting_for, peers)
    try:
        with doing(name) if is_work else doing(f"wait '{name}'", limit_s):
            yield wait
    except TimeoutError as error:
        raise wait.error() from error
    except RuntimeError as error:
        if _TIMED_OUT.search(str(error)):
            raise wait.error() from error
        if _PEER_LEFT.search(str(error)):
            raise wait.error(lost_peer=True) from error
        raise


def as_lost_peer(error: BaseException, rank: int) -> DeadlineError | None:
    """Translate an error of a collective that has no named wait, such as Megatron's own: it timed out, or a peer left.

    Returns: None for an error of another kind.
    """
    is_timeout, is_lost = (isinstance(error, RuntimeError) and pattern.search(str(error)) for pattern in (_TIMED_OUT, _PEER_LEFT))
    if isinstance(error, DeadlineError) or not (is_timeout or is_lost):
        return None
    everyone = tuple(range(dist.get_world_size())) if dist.is_initialized() else ()
    seen = _describe_peers(tuple(peer for peer in everyone if peer != rank)) if _describe_peers is not None else ""
    return DeadlineError(
        f"rank {rank} lost a peer in a collective" if is_lost else f"rank {rank} waited too long for a peer in a collective",
        where=current()[0],
        got=str(error).strip().splitlines()[0] + (f"; last seen: {seen}" if seen else ""),
        fix="look at the first error in the logs of the other ranks; raise run.deadline_s only if the work is really that slow",
    )
