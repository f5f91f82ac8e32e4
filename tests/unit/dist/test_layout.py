"""Rank arithmetic."""

from __future__ import annotations

from itertools import product

import pytest

from megatron_rpp.config.schema import Parallel
from megatron_rpp.dist.layout import (
    Coords,
    ExpertCoords,
    coords_of,
    engine_group,
    engine_groups,
    expert_coords_of,
    num_engines,
    rank_of,
    world_size_of,
)
from megatron_rpp.errors import GeometryError


def test_tp_varies_fastest_and_pp_slowest() -> None:
    """tp 2, cp 2, dp 3, pp 2: rank 21 = 1 + 2 * (0 + 2 * (2 + 3 * 1))."""
    parallel = Parallel(tp=2, cp=2, dp=3, pp=2)
    assert coords_of(21, parallel) == Coords(tp=1, cp=0, dp=2, pp=1)
    assert rank_of(Coords(tp=1, cp=0, dp=2, pp=1), parallel) == 21


@pytest.mark.parametrize(("tp", "cp", "dp", "pp"), [(1, 1, 1, 1), (2, 1, 3, 2), (4, 2, 1, 3), (1, 3, 2, 2)])
def test_ranks_and_coordinates_are_one_to_one(tp: int, cp: int, dp: int, pp: int) -> None:
    """In the order that Megatron's default "tp-cp-ep-dp-pp" counts them."""
    parallel = Parallel(tp=tp, cp=cp, dp=dp, pp=pp)
    in_order = [Coords(tp=t, cp=c, dp=d, pp=p) for p, d, c, t in product(range(pp), range(dp), range(cp), range(tp))]
    assert [coords_of(rank, parallel) for rank in range(world_size_of(parallel))] == in_order
    assert [rank_of(coords, parallel) for coords in in_order] == list(range(tp * cp * dp * pp))


def test_experts_count_the_ranks_of_each_stage_in_their_own_order() -> None:
    """tp 2, dp 4, pp 2, ep 2, etp 2: a stage has 8 ranks, two copies of four shares."""
    parallel = Parallel(tp=2, dp=4, pp=2, ep=2, etp=2)
    in_order = [ExpertCoords(etp=x, ep=e, edp=d) for d, e, x in product(range(2), range(2), range(2))]
    assert [expert_coords_of(rank, parallel) for rank in range(16)] == 2 * in_order
    with pytest.raises(GeometryError, match="ep 3 x etp 1 = 3"):
        expert_coords_of(0, Parallel(dp=2, ep=3))


def test_what_the_layout_does_not_hold_is_refused() -> None:
    parallel = Parallel(tp=2, dp=2)
    with pytest.raises(GeometryError, match=r"\[0, 4\), as tp 2 x cp 1 x dp 2 x pp 1 = 4"):
        coords_of(4, parallel)
    with pytest.raises(GeometryError, match="0 <= dp < 2"):
        rank_of(Coords(dp=2), parallel)


def test_engines_stand_on_consecutive_ranks_and_their_first_leads() -> None:
    groups = engine_groups(2, num_engines(6, 2, None))
    assert [group.ranks for group in groups] == [(0, 1), (2, 3), (4, 5)]
    assert [group.leader for group in groups] == [0, 2, 4]
    assert engine_group(3, 2, 3) == groups[1]


def test_fewer_engines_leave_the_last_ranks_without_one() -> None:
    assert num_engines(5, 2, 2) == 2
    assert engine_group(3, 2, 2).index == 1
    assert engine_group(4, 2, 2) is None


@pytest.mark.parametrize(("world", "tp", "engines"), [(5, 2, None), (4, 2, 3), (4, 8, None), (4, 2, 0)])
def test_engines_that_do_not_fit_are_refused(world: int, tp: int, engines: int | None) -> None:
    with pytest.raises(GeometryError):
        num_engines(world, tp, engines)
