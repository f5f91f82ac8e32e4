"""What goes wrong on one rank is known to all: nobody waits for a peer that has already given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import megatron_rpp.errors
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import EngineError, RppError


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of some rank, as all ranks know it. kind: the name of its class."""

    rank: int
    kind: str
    message: str

    def as_error(self, what: str) -> RppError:
        """The error to raise on the other ranks."""
        kind = getattr(megatron_rpp.errors, self.kind, EngineError)
        error = kind(f"{what} failed on rank {self.rank}: {self.message}", fix=f"see logs/rank-{self.rank}.log in the run directory")
        error.origin, error.is_shared = self.rank, True
        return error


def share_errors(error: RppError | None, *, groups: Groups, what: str, deadline_s: float) -> tuple[Failure, ...]:
    """The errors of all ranks, in rank order and the same on each, so that all decide alike what follows from them.

    Entered by every rank. Units: deadline_s in seconds. Raises: DeadlineError when a rank does not come.
    """
    mine = None if error is None else (type(error).__name__, str(error))
    found = gather_objects(mine, groups.world_cpu, name=what, deadline_s=deadline_s)
    return tuple(Failure(rank, *report) for rank, report in enumerate(found) if report is not None)


def raise_together(error: RppError | None, *, groups: Groups, what: str, deadline_s: float) -> None:
    """Entered by every rank, with the error that this rank met or None; returns only when no rank met one.

    Units: deadline_s in seconds, for the slowest rank to arrive.
    Raises: the local error where there is one; elsewhere one of the first failing rank's class, with its message;
    DeadlineError when a rank does not come.
    """
    failures = share_errors(error, groups=groups, what=what, deadline_s=deadline_s)
    if error is not None:
        error.is_shared = True
        raise error
    if failures:
        raise failures[0].as_error(what)


def attempt(call: Callable[[], object]) -> RppError | None:
    """The error that a call ended with, for `raise_together`."""
    try:
        call()
    except RppError as error:
        return error
    return None
