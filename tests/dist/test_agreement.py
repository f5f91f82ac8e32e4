"""One rank's error is every rank's error."""

from __future__ import annotations

from megatron_rpp.dist.agreement import raise_together
from megatron_rpp.errors import NumericsError, RppError
from tests.dist.ranks import run_ranks


def _agree(rank: int, fails: int | None) -> tuple[str, str, tuple[bool, int | None]]:
    from torch import distributed as dist

    groups = type("Groups", (), {"world_cpu": dist.group.WORLD})
    error = NumericsError("the loss is not finite", where="step 3") if rank == fails else None
    try:
        raise_together(error, groups=groups, what="update", deadline_s=20)
    except RppError as raised:
        return type(raised).__name__, str(raised), (raised.is_shared, raised.origin)
    return "", "", (False, None)


def test_the_other_ranks_raise_the_same_class_and_name_the_rank() -> None:
    own, other = run_ranks(2, _agree, 0)
    assert own == ("NumericsError", "step 3: the loss is not finite", (True, None))
    assert other[0] == "NumericsError"
    assert "update failed on rank 0: step 3: the loss is not finite" in other[1]
    assert other[2] == (True, 0)


def test_nobody_raises_when_nobody_failed() -> None:
    assert run_ranks(2, _agree, None) == [("", "", (False, None))] * 2
