"""Group means by id, and the groups that have none."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.baselines import (
    Scores,
    clip_scores,
    greedy_baseline,
    group_mean_baseline,
    group_std,
    leave_one_out_baseline,
    zero_variance_frac,
)
from megatron_rpp.errors import NumericsError
from tests.reference.cases import draw
from tests.reference.properties import steady, thorough


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


@pytest.mark.parametrize("unit", [1e200, 1.0, 2.0**-1070])
def test_a_deviation_is_right_whatever_the_scores_are_counted_in(unit: float) -> None:
    """3 and 5 around 4; by n a deviation of 1."""
    scores = _scores([3 * unit, 5 * unit], [0, 0])
    assert group_std(scores, torch.tensor([0]), unbiased=False).item() == pytest.approx(unit, rel=1e-15, abs=0)


def test_scores_are_clipped_in_float64() -> None:
    assert clip_scores(torch.tensor([30.0, -30.0, 0.5]), (-10.0, 10.0)).tolist() == [10.0, -10.0, 0.5]
    assert clip_scores(torch.tensor([30.0]), None).dtype == torch.float64


def test_the_mean_of_the_others_by_hand() -> None:
    """Group 0 holds 1 0 0: the others of the 1 have mean 0, those of a 0 have 1/2. Group 1 holds 3 5: each has the other."""
    scores = _scores([1.0, 3.0, 0.0, 5.0, 0.0], [0, 1, 0, 1, 0])
    assert leave_one_out_baseline(scores, scores.group_S, scores.score_S).tolist() == [0.0, 5.0, 0.5, 3.0, 0.5]


def test_the_mean_of_the_others_needs_an_other() -> None:
    scores = _scores([1.0, 0.0, 1.0], [0, 0, 1], ("sum-3", "sum-9"))
    with pytest.raises(NumericsError, match="prompt sum-9"):
        leave_one_out_baseline(scores, scores.group_S, scores.score_S)


def test_an_own_score_that_is_not_among_its_groups_is_refused() -> None:
    """As when a penalty was taken over another mask on this rank than in what was gathered."""
    scores = _scores([1.0, 0.0], [0, 0], ("sum-3",))
    with pytest.raises(NumericsError, match=r"prompt sum-3(.|\n)*0\.5"):
        leave_one_out_baseline(scores, torch.tensor([0]), torch.tensor([0.5]))


def test_the_deviation_of_a_group_by_hand() -> None:
    """1 0 0 1: squares of 1/2 add up to 1, over 3 or over 4. Group 1 has equal scores."""
    scores = _scores([1.0, 0.7, 0.0, 0.0, 0.7, 1.0], [0, 1, 0, 0, 1, 0])
    root = math.sqrt(1 / 3)
    assert group_std(scores, scores.group_S, unbiased=True).tolist() == [root, 0.0, root, root, 0.0, root]
    assert group_std(scores, torch.tensor([1, 0]), unbiased=False).tolist() == [0.0, 0.5]


def test_a_deviation_keeps_its_digits_far_from_zero() -> None:
    """1e8 + 1e-4 * (1 2 3 4), whose squares in float64 would leave nothing: exact values of the floats given, exact fractions."""
    values = [1e8 + 1e-4 * i for i in range(1, 5)]
    scores = _scores(values, [0] * 4)
    exact = [Fraction(value) for value in values]
    variance = sum((value - sum(exact) / 4) ** 2 for value in exact) / 3
    assert group_std(scores, torch.tensor([0]), unbiased=True).item() == pytest.approx(math.sqrt(variance), rel=1e-15)


def test_the_greedy_score_goes_by_the_prompts_number() -> None:
    scores = replace(_scores([0.0, 0.0], [0, 1], ("sum-3", "sum-9")), greedy_P=torch.tensor([0.25, 0.5]))
    assert greedy_baseline(scores, torch.tensor([1, 0, 1])).tolist() == [0.5, 0.25, 0.5]
    with pytest.raises(NumericsError, match="prompt sum-9"):
        greedy_baseline(replace(scores, greedy_P=torch.tensor([0.25, math.nan])), torch.tensor([0]))
    with pytest.raises(ValueError, match="greedy_P"):
        greedy_baseline(replace(scores, greedy_P=None), torch.tensor([0]))


def test_the_share_of_prompts_that_teach_nothing() -> None:
    """Of two prompts one has differing scores; a lone response compares with nothing, unless there is a greedy one."""
    assert zero_variance_frac(_scores([1.0, 1.0, 0.0, 1.0, 0.5], [4, 4, 7, 7, 9])) == 1 / 2
    assert zero_variance_frac(_scores([], [])) == 0.0
    alone = _scores([1.0, 0.0, 1.0], [0, 1, 2])
    assert zero_variance_frac(alone) == 0.0
    assert zero_variance_frac(replace(alone, greedy_P=torch.tensor([1.0, 1.0, 1.0]))) == 2 / 3


@thorough
@given(st.integers(0, 2**32 - 1))
def test_means_and_deviations_are_the_rounded_exact_ones(seed: int) -> None:
    rng = random.Random(seed)
    rows = draw(seed, score=lambda rng: rng.gauss(0, 1) * 10.0 ** rng.randint(-8, 8))
    scores = _scores([row.score for row in rows], [row.group for row in rows])
    asked = torch.tensor([rng.randrange(len(rows)) for _ in range(4)])
    group_S, unbiased = scores.group_S[asked], bool(seed % 2)
    got = zip(
        group_mean_baseline(scores, group_S).tolist(),
        leave_one_out_baseline(scores, group_S, scores.score_S[asked]).tolist(),
        group_std(scores, group_S, unbiased=unbiased).tolist(),
        strict=True,
    )
    for place, (mean, others, deviation) in zip(asked.tolist(), got, strict=True):
        group = [Fraction(row.score) for row in rows if row.group == rows[place].group]
        centre = sum(group) / len(group)
        assert mean == float(centre)
        assert others == float((sum(group) - Fraction(rows[place].score)) / (len(group) - 1))
        assert deviation == pytest.approx(math.sqrt(sum((x - centre) ** 2 for x in group) / (len(group) - unbiased)), rel=1e-15)
