"""The work shared by all engines: whoever is free takes the next prompt, so a slow prompt holds nobody else.

A torch store is the only thing shared. It is torch.distributed's, but no process group is involved: leaders may differ in
speed and may be alone. Which leader takes which prompt is chance, and seeds make it of no consequence.
A leader that gives up says so here. One that falls silent is found by the ranks' heartbeats (dist/heartbeat.py), also when it hosts
the store and a request to it does not return.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed import DistError, HashStore, PrefixStore, Store

from megatron_rpp.errors import EngineError

ASK_EVERY_S = 1.0
WAIT_EVERY_S = 0.05


class WorkQueue:
    """Hands out 0 .. num_items - 1, each once over all leaders. Every leader opens the same rounds in the same order.

    store: shared by all leaders; None serves a single one.
    """

    def __init__(self, store: Store | None = None, *, leader: int = 0, num_leaders: int = 1) -> None:
        self.leader, self.num_leaders = leader, num_leaders
        self._store = PrefixStore("rollout-queue", HashStore() if store is None else store)
        self._round, self._num_items, self._last_asked = 0, 0, 0.0

    def open(self, num_items: int) -> None:
        """Begin the next round."""
        self._round += 1
        self._num_items = num_items

    def claim(self) -> int | None:
        """The next item, now this leader's own; None when all are taken. Raises: EngineError when the store is gone."""
        with self._asking("claim a prompt"):
            item = self._store.add(f"{self._round}/claimed", 1) - 1
        return item if item < self._num_items else None

    def finish(self) -> None:
        """One of this leader's items is done."""
        with self._asking("report a prompt as done"):
            self._store.add(f"{self._round}/done", 1)

    def give_up(self, reason: str) -> None:
        """Tell the other leaders that this one will not finish its items. Silent when the store is gone: then they know."""
        with suppress(DistError):
            self._store.set("gave-up", f"leader {self.leader}: {reason}")

    def check(self) -> None:
        """Ask, at most once a second, whether another leader gave up. Raises: EngineError when one did, or when the store is gone."""
        if time.monotonic() - self._last_asked > ASK_EVERY_S:
            with self._asking("look for leaders that gave up"):
                self._check_given_up()
            self._last_asked = time.monotonic()

    def wait(self) -> None:
        """Return when every item is done, however long the other leaders need.

        Raises: EngineError when one gave up, or when the store is gone.
        """
        while True:
            with self._asking("wait for the other leaders"):
                if self._store.add(f"{self._round}/done", 0) >= self._num_items:
                    return
            self.check()
            time.sleep(WAIT_EVERY_S)

    def _check_given_up(self) -> None:
        if self._store.check(["gave-up"]):
            reason = self._store.get("gave-up").decode()
            raise EngineError("another engine gave up", where=f"leader {self.leader}", got=reason, fix="see the log of that leader")

    @contextmanager
    def _asking(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            raise EngineError(
                "the roll-out queue is lost",
                where=f"leader {self.leader}, {purpose}",
                expected="an answer of the store of the run",
                got=str(error).partition("\n")[0],
                fix="rank 0, or torchrun, has probably ended; its log has the cause",
            ) from error
