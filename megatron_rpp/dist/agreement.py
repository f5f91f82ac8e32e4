"""What goes wrong on one rank is known to all: nobody waits for a peer that has already given up."""

from __future__ import annotations

import megatron_rpp.errors
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import EngineError, RppError


def raise_together(error: RppError | None, *, groups: Groups, what: str, deadline_s: float) -> None:
    """Entered by every rank, with the error that this rank met or None; returns only when no rank met one.

    Units: deadline_s in seconds, for the slowest rank to arrive.
    Raises: the local error where there is one; elsewhere one of the first failing rank's class, with its message;
    DeadlineError when a rank does not come.
    """
    mine = None if error is None else (type(error).__name__, str(error))
    found = gather_objects(mine, groups.world_cpu, name=what, deadline_s=deadline_s)
    if error is not None:
        raise error
    for rank, report in enumerate(found):
        if report is not None:
            kind = getattr(megatron_rpp.errors, report[0], EngineError)
            raise kind(f"{what} failed on rank {rank}: {report[1]}", fix=f"see logs/rank-{rank}.log in the run directory")
