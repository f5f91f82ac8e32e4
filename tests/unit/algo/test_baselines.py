"""Group means by id, and the groups that have none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.baselines import Scores, clip_scores, group_mean_baseline, is_informative
from megatron_rpp.errors import NumericsError
from tests.reference.properties import steady


def _scores(score: list[float], group: list[int], uids: tuple[str, ...] = ()) -> Scores:
    return Scores(torch.tensor(score, dtype=torch.float64), torch.tensor(group), uids)


def test_groups_go_by_id_and_not_by_position() -> None:
    """Group 0 holds 1 and 0, mean 1/2; group 1 holds 3 and 5, mean 4; they are interleaved."""
    scores = _scores([1.0, 3.0, 0.0, 5.0], [0, 1, 0, 1])
    assert group_mean_baseline(scores, scores.group_S).tolist() == [0.5, 4.0, 0.5, 4.0]


def test_a_rank_asks_for_its_own_responses_only() -> None:
    """The rank holds one response of group 1 and one of group 0; the means are still those of whole groups, of unequal size."""
    scores = _scores([1.0, 0.0, 0.5, 3.0, 5.0], [0, 0, 0, 1, 1])
    assert group_mean_baseline(scores, torch.tensor([1, 0])).tolist() == [4.0, 0.5]


def test_an_empty_rank_asks_for_nothing() -> None:
    scores = _scores([1.0, 0.0], [0, 0])
    assert group_mean_baseline(scores, torch.tensor([], dtype=torch.int64)).tolist() == []


def test_a_group_of_one_is_refused_by_the_prompts_name() -> None:
    scores = _scores([1.0, 0.0, 1.0], [0, 0, 1], ("sum-3", "sum-9"))
    with pytest.raises(NumericsError, match=r"prompt sum-9(.|\n)*at least 2(.|\n)*samples_per_prompt"):
        group_mean_baseline(scores, scores.group_S)


def test_a_group_of_one_is_refused_on_ranks_that_do_not_hold_it_too() -> None:
    scores = _scores([1.0, 0.0, 1.0], [0, 0, 1])
    with pytest.raises(NumericsError, match="group 1"):
        group_mean_baseline(scores, torch.tensor([0, 0]))


def test_a_score_that_is_not_finite_is_refused() -> None:
    scores = _scores([1.0, math.nan], [0, 0], ("p",))
    with pytest.raises(NumericsError, match="not finite"):
        group_mean_baseline(scores, scores.group_S)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3, 1e-300])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 11])
def test_equal_scores_are_exactly_their_own_mean(value: float, size: int) -> None:
    """Summed naively, seven times 0.1 over 7 is 0.09999999999999999."""
    scores = _scores([value] * size, [4] * size)
    assert group_mean_baseline(scores, scores.group_S).tolist() == [value] * size


@steady
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_show_in_the_bits(values: list[float], dice: object) -> None:
    shuffled = list(values)
    dice.shuffle(shuffled)
    means = [group_mean_baseline(_scores(v, [0] * len(v)), torch.tensor([0])).item() for v in (values, shuffled)]
    assert means[0] == means[1]


def test_a_group_teaches_only_when_its_scores_differ() -> None:
    """Eight float32 copies of 0.7 have a computed deviation of 6e-8; max == min is not fooled. Ids need not be dense."""
    same = [float(torch.tensor(0.7))] * 3
    scores = _scores([*same, 1.0, 0.0], [900, 900, 900, 7, 7])
    assert is_informative(scores).tolist() == [False, False, False, True, True]


def test_scores_are_clipped_in_float64() -> None:
    assert clip_scores(torch.tensor([30.0, -30.0, 0.5]), (-10.0, 10.0)).tolist() == [10.0, -10.0, 0.5]
    assert clip_scores(torch.tensor([30.0]), None).dtype == torch.float64
