"""The collectives over real gloo processes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.dist.collectives import all_gather, barrier, broadcast_object, gather_objects, sum_float64, sum_int64
from megatron_rpp.errors import DeadlineError
from tests.dist.ranks import RankError, run_ranks


def _sum_in_order(rank: int) -> list[float]:
    # 1e16 + 1 is lost, 1 + 1 is not: the order of the addition shows in the bits.
    values = torch.tensor([[1e16, 1.0, -1e16, 1.0][rank], [1.0, 1.0, 1e16, -1e16][rank]])
    return sum_float64(values.to(torch.float64), dist.group.WORLD).tolist()


def test_sum_float64_adds_in_rank_order_on_every_rank() -> None:
    """((1e16 + 1) - 1e16) + 1 = 1 as 1e16 + 1 rounds to 1e16; ((1 + 1) + 1e16) - 1e16 = 2 as 1e16 + 2 is exact."""
    assert run_ranks(4, _sum_in_order) == [[1.0, 2.0]] * 4


def _strided(rank: int) -> tuple[list[float], list[list[int]]]:
    matrix = torch.arange(12, dtype=torch.float64).reshape(3, 4) + 100 * rank
    total = sum_float64(matrix[:, 1], dist.group.WORLD)
    parts = all_gather(matrix.t()[1].long(), dist.group.WORLD)
    return total.tolist(), [part.tolist() for part in parts]


def test_strided_tensors_arrive_as_they_are() -> None:
    """Column 1 of the 3 x 4 matrix 0..11 is [1, 5, 9], rank 1 has it plus 100: the sum is twice that plus 100."""
    expected = ([102.0, 110.0, 118.0], [[1, 5, 9], [101, 105, 109]])
    assert run_ranks(2, _strided) == [expected, expected]


def _integers(rank: int) -> list[int]:
    return sum_int64(torch.tensor([2**52 + rank, -rank]), dist.group.WORLD).tolist()


def test_integer_sums_are_exact_beyond_what_a_float_holds() -> None:
    assert run_ranks(3, _integers) == [[3 * 2**52 + 3, -3]] * 3


def _objects(rank: int) -> tuple[list[object], object]:
    mine = {"rank": rank, "long": "x" * (1000 * rank)}
    return gather_objects(mine, dist.group.WORLD), broadcast_object(("from", rank), dist.group.WORLD, src=1)


def test_objects_of_unequal_length_reach_every_rank() -> None:
    expected = ([{"rank": r, "long": "x" * (1000 * r)} for r in range(3)], ("from", 1))
    assert run_ranks(3, _objects) == [expected] * 3


def _subgroup(rank: int) -> tuple[float, object] | None:
    group = dist.new_group([1, 2], backend="gloo")
    if rank == 0:
        return None
    return sum_float64(torch.tensor([float(rank)]), group).item(), broadcast_object(rank, group, src=1)


def test_src_counts_inside_the_group() -> None:
    assert run_ranks(3, _subgroup) == [None, (3.0, 2), (3.0, 2)]


def _absent_peer(rank: int) -> str:
    barrier(dist.group.WORLD, name="start")
    if rank == 1:
        time.sleep(4.0)
        return "came too late"
    start = time.monotonic()
    try:
        gather_objects("here", dist.group.WORLD, name="gather groups", deadline_s=1.0)
    except DeadlineError as error:
        return f"{time.monotonic() - start < 3.0} {error}"
    return "no error"


def test_a_peer_that_does_not_come_is_an_error_that_names_the_wait() -> None:
    said = run_ranks(2, _absent_peer, timeout_s=30)[0]
    assert said.startswith("True "), said
    assert "wait 'gather groups'" in said
    assert "rank 0 waited longer than 1 s" in said
    assert "ranks 0, 1 to take part" in said


def _fails_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one is broken")


def test_a_failing_rank_brings_its_own_traceback() -> None:
    with pytest.raises(RankError, match="ValueError: rank one is broken") as caught:
        run_ranks(2, _fails_on_one)
    assert list(caught.value.tracebacks) == [1]


def _hangs_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_a_hanging_rank_brings_its_stack() -> None:
    with pytest.raises(RankError, match="_hangs_on_one"):
        run_ranks(2, _hangs_on_one, timeout_s=3)
