"""The two estimators of REINFORCE++ as a whole: goldens by hand, the loop oracle, and what must not change the result."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_rpp.algo.advantage import AdvantageStats, compute_advantages
from megatron_rpp.algo.baselines import Scores
from megatron_rpp.algo.credit_stats import summarise
from megatron_rpp.algo.estimators import ESTIMATORS
from megatron_rpp.config.schema import NORMALISED, Algo, EstimatorName
from megatron_rpp.errors import NumericsError
from megatron_rpp.stats.moments import whiten
from megatron_rpp.types import PackedBatch
from tests.reference.batches import close, packed, rows_of
from tests.reference.estimators import advantages

REINFORCE_PP: tuple[EstimatorName, ...] = ("reinforce_pp", "reinforce_pp_baseline")


def compute(
    batch: PackedBatch, scores: Scores | None = None, *, stats: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Tensor, AdvantageStats]:
    """stats: what the session binds into the normaliser."""
    scores = scores or Scores(batch.score_S, batch.group_S)
    return compute_advantages(batch, Algo(**options), scores=scores, normaliser=partial(whiten, group=None, **(stats or {})))


def rows(batch: PackedBatch, **options: Any) -> list[list[float]]:
    return rows_of(compute(batch, **options)[0], batch)


def test_there_is_one_function_for_each_name_in_the_schema() -> None:
    assert tuple(ESTIMATORS) == get_args(EstimatorName)
    assert len(set(ESTIMATORS.values())) == len(ESTIMATORS)
    assert set(ESTIMATORS) - NORMALISED == {"rloo", "remax", "grpo", "dr_grpo"}


TOY_MASKS = [[1, 1, 1], [1, 1], [1, 1, 1, 1], [1]]


def test_reinforce_pp_by_hand() -> None:
    """Scores 1 -1 1 -1 on 3 2 4 1 tokens: mean (3 - 2 + 4 - 1) / 10 = 0.4, variance 1 - 0.16 = 0.84, so a right token gets
    0.6 / sqrt(0.84) = 0.6546536707 and a wrong one -1.4 / sqrt(0.84) = -1.5275252317."""
    right, wrong = 0.6 / math.sqrt(0.84), -1.4 / math.sqrt(0.84)
    got = rows(packed(TOY_MASKS, [1, -1, 1, -1]), estimator="reinforce_pp")
    close(got, [[right] * 3, [wrong] * 2, [right] * 4, [wrong]])


def test_counting_responses_instead_of_tokens_by_hand() -> None:
    """Each of four responses once: mean 0, variance 1, whatever the lengths."""
    got = rows(packed(TOY_MASKS, [1, -1, 1, -1]), estimator="reinforce_pp", stats={"population": "sample"})
    assert got == [[1.0] * 3, [-1.0] * 2, [1.0] * 4, [-1.0]]


def test_leaving_the_mean_in_place_by_hand() -> None:
    """As the token golden, only divided: +-1 / sqrt(0.84). A value of 0 stays 0."""
    got = rows(packed(TOY_MASKS, [1, -1, 1, -1]), estimator="reinforce_pp", stats={"recentre": False})
    close(got, [[1 / math.sqrt(0.84)] * 3, [-1 / math.sqrt(0.84)] * 2, [1 / math.sqrt(0.84)] * 4, [-1 / math.sqrt(0.84)]])


def test_the_kl_still_to_come_lowers_the_return_by_hand() -> None:
    """The toy with beta 0.1. Row 0: x = 0.1, 0.2, -0.1, so returns 1 + 0.01 = 1.01 last, 1.01 - 0.02 = 0.99, 0.99 - 0.01 = 0.98.
    Over the ten tokens the mean is 0.4 and the variance 0.82024: (0.98 - 0.4) / sqrt(0.82024) = 0.6404091397."""
    old = [[-1.0, -0.5, -0.2], [-0.3, -0.9], [-0.1, -0.2, -0.3, -0.4], [-0.7]]
    ref = [[-1.1, -0.7, -0.1], [-0.5, -0.6], [-0.2, -0.2, -0.5, -0.3], [-0.6]]
    batch = packed(TOY_MASKS, [1, -1, 1, -1], old=old, ref=ref)
    got, stats = compute(batch, estimator="reinforce_pp", kl_reward_coef=0.1)
    close(rows_of(got, batch)[0], [0.6404091397, 0.6514506766, 0.6735337504], rtol=1e-9)
    assert stats.return_mean == pytest.approx(0.4, abs=1e-15)
    assert stats.return_std**2 == pytest.approx(0.82024, rel=1e-12)


def test_the_baseline_variant_by_hand() -> None:
    """1 0 0 1 and 1 0 0 0: centred +-1/2 and 3/4, -1/4; variance (4 / 4 + 9 / 16 + 3 / 16) / 8 = 0.21875."""
    unit = 1 / math.sqrt(0.21875)
    batch = packed([[1]] * 8, [1, 0, 0, 1, 1, 0, 0, 0], groups=[0, 0, 0, 0, 1, 1, 1, 1])
    expected = [[v * unit] for v in (0.5, -0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25)]
    close(rows(batch, estimator="reinforce_pp_baseline"), expected)


def test_a_solved_prompt_still_gets_the_batchs_token_mean() -> None:
    """Right answers of 1 token, wrong ones of 4: centred +-1/2, and a solved prompt of two 1-token answers, centred 0.
    Ten wrong-answer... tokens: +1/2 twice, -1/2 eight times, 0 twice: mean -3/12 = -1/4, variance 10/48 - 1/16 = 7/48.
    The solved prompt's tokens get 1/4 / sqrt(7/48); counted by responses the mean is 0 and so is theirs."""
    masks = [[1], [1] * 4, [1], [1] * 4, [1], [1]]
    batch = packed(masks, [1, 0, 1, 0, 1, 1], groups=[0, 0, 1, 1, 2, 2])
    got = rows(batch, estimator="reinforce_pp_baseline")
    assert got[4] == got[5]
    assert got[4][0] == pytest.approx(0.25 / math.sqrt(7 / 48), rel=1e-14)
    assert rows(batch, estimator="reinforce_pp_baseline", stats={"population": "sample"})[4] == [0.0]


def test_scores_are_clipped_before_the_mean_is_taken() -> None:
    """30 0 0 2 held to [-10, 10] is 10 0 0 2, mean 3: 7 -3 -3 -1, variance (49 + 9 + 9 + 1) / 4 = 17. Clipped after the mean
    it would be 10 -8 -8 -6 of 30 0 0 2 less 8."""
    batch = packed([[1]] * 4, [30, 0, 0, 2], groups=[0] * 4)
    close(rows(batch, estimator="reinforce_pp_baseline"), [[v / math.sqrt(17)] for v in (7, -3, -3, -1)])


def test_a_group_split_over_ranks_keeps_its_mean() -> None:
    """This rank holds one response of a group of two: the mean is 1/2 all the same, so alone on the rank it has +1/2 - 1/2 = 0."""
    batch = packed([[1], [1]], [1.0, 3.0], groups=[0, 1])
    everything = Scores(torch.tensor([1.0, 0.0, 3.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1]))
    got, stats = compute(batch, everything, estimator="reinforce_pp_baseline")
    assert stats.return_mean == 0.75  # (0.5 + 1) / 2
    close(got.tolist(), [-1.0, 1.0])


def test_a_prompt_with_one_response_is_refused_by_the_baseline_variant_only() -> None:
    batch = packed([[1, 1], [1]], [1.0, -1.0])
    with pytest.raises(NumericsError, match="group 0"):
        compute(batch, estimator="reinforce_pp_baseline")
    assert rows(batch, estimator="reinforce_pp")[1][0] < 0


@pytest.mark.parametrize("population", ["token", "sample"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1e-9, -1.0])
@pytest.mark.parametrize("estimator", REINFORCE_PP)
def test_a_batch_of_equal_scores_teaches_exactly_nothing(estimator: EstimatorName, value: float, population: str) -> None:
    batch = packed([[1] * 7, [1] * 3, [1], [1] * 5], [value] * 4, groups=[0, 0, 1, 1])
    got, stats = compute(batch, estimator=estimator, stats={"population": population})
    assert got.tolist() == [0.0] * 16
    assert stats.return_std == 0.0


def test_one_token_in_the_whole_batch_is_zero_and_not_nan() -> None:
    assert rows(packed([[0, 1, 0]], [3.0]), estimator="reinforce_pp") == [[0.0, 0.0, 0.0]]


def test_a_row_without_a_token_changes_nothing_but_its_groups_mean() -> None:
    with_row = packed([[1, 1], [0, 0], [1]], [1.0, 0.0, -1.0])
    without = packed([[1, 1], [1]], [1.0, -1.0])
    got, expected = rows(with_row, estimator="reinforce_pp"), rows(without, estimator="reinforce_pp")
    assert got == [expected[0], [0.0, 0.0], expected[1]]


def test_the_engines_flag_of_truncation_and_the_length_change_no_advantage() -> None:
    batch = packed([[1, 1], [1]], [1.0, -1.0])
    flagged = replace(batch, is_truncated_S=torch.tensor([True, False]))
    assert rows(flagged, estimator="reinforce_pp") == rows(batch, estimator="reinforce_pp")


def test_stats_tell_the_range_that_the_advantages_really_have() -> None:
    batch = _random_batch(3)[0]
    for recentre in (True, False):
        got, stats = compute(batch, estimator="reinforce_pp", kl_reward_coef=0.2, stats={"recentre": recentre})
        trained, made = got[batch.mask_T], summarise([stats.share])
        assert (made.min, made.max, made.abs_max) == (trained.min(), trained.max(), trained.abs().max())
        assert stats.population_size == int(batch.mask_T.sum())
        assert stats.zero_variance_frac == 0.0


def test_a_token_out_of_the_loss_stays_in_the_credit_of_the_others() -> None:
    """Three tokens, scores 1 and -1, gamma 1/2. The last token of the first row is rejected: it leaves the statistics and gets 0,
    but the score still stands on it, two places from the first token: 1/4 and 1/2, not 1/2 and 1. With -1/4 -1/2 -1 of the other
    row the mean is -1/5."""
    batch = packed([[1, 1, 1], [1, 1, 1]], [1.0, -1.0])
    kept_T = torch.tensor([True, True, False, True, True, True])
    algo = Algo(estimator="reinforce_pp", gamma=0.5)
    normaliser = partial(whiten, group=None)
    adv_T, stats = compute_advantages(batch, algo, scores=Scores(batch.score_S, batch.group_S), normaliser=normaliser, kept_T=kept_T)
    assert stats.return_mean == pytest.approx(-0.2, rel=1e-15)
    assert adv_T[2] == 0
    close(adv_T.tolist(), [(v + 0.2) / stats.return_std if v else 0.0 for v in (0.25, 0.5, 0, -0.25, -0.5, -1)])
    made = summarise([stats.share])
    assert made.token_mean == pytest.approx(0, abs=1e-15)
    # By responses the first has two tokens that count, 1/4 and 1/2, and the other three: (3/8 - 7/12) / 2 + 1/5.
    assert made.sample_mean == pytest.approx((0.2 - 5 / 48) / stats.return_std, rel=1e-12)


def test_an_estimator_whose_paper_does_not_whiten_keeps_its_values() -> None:
    """Centred +-1/2 times k / (k - 1) = 2: the session binds rescale=False for it, and the statistics are measured all the same."""
    batch = packed([[1], [1, 1]], [1.0, 0.0], groups=[0, 0])
    got, stats = compute(batch, estimator="rloo", stats={"rescale": False})
    assert got.tolist() == [1.0, -1.0, -1.0]
    assert (stats.return_min, stats.return_max, stats.population_size) == (-1.0, 1.0, 3)


def _random_batch(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[PackedBatch, list[list[tuple[bool, float, float]]]]:
    """Two prompts of three, with interior masks, a row without a token and garbage outside the mask."""
    dice = random.Random(seed)
    lengths = [dice.randint(1, 12) for _ in range(6)]
    masks = [[dice.random() < 0.7 for _ in range(length)] for length in lengths]
    masks[0][0] = True
    masks[4] = [False] * lengths[4]
    old, ref = ([[dice.gauss(-1, 0.5) for _ in range(length)] for length in lengths] for _ in range(2))
    if dtype != torch.float64:
        old, ref = ([torch.tensor(row, dtype=dtype).tolist() for row in rows_] for rows_ in (old, ref))
    scores = [dice.choice([0.0, 1.0, 0.25, 20.0, -20.0]) for _ in range(6)]
    batch = packed(masks, scores, groups=[0, 1, 0, 1, 0, 1], old=old, ref=ref, dtype=dtype)
    return batch, [list(zip(*row, strict=True)) for row in zip(masks, old, ref, strict=True)]


@pytest.mark.parametrize("estimator", REINFORCE_PP)
@pytest.mark.parametrize(("population", "recentre"), [("token", True), ("sample", True), ("token", False), ("sample", False)])
@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.9), (0.0, 0.0)])
def test_the_fast_way_equals_the_loop(estimator: str, population: str, recentre: bool, beta: float, gamma: float) -> None:
    options = {"estimator": estimator, "kl_reward_coef": beta, "gamma": gamma, "stats": {"population": population, "recentre": recentre}}
    for seed in range(5):
        batch, responses = _random_batch(seed)
        baseline = estimator == "reinforce_pp_baseline"
        expected = advantages(
            responses,
            batch.score_S.tolist(),
            batch.group_S.tolist(),
            baseline=baseline,
            beta=beta,
            gamma=gamma,
            clip=(-10.0, 10.0),
            population=population,
            recentre=recentre,
        )
        close(rows(batch, **options), expected, rtol=1e-11, atol=1e-11)


def test_bfloat16_log_probabilities_are_upcast_before_they_are_subtracted() -> None:
    batch, responses = _random_batch(11, dtype=torch.bfloat16)
    got = rows(batch, estimator="reinforce_pp", kl_reward_coef=0.1)
    expected = advantages(responses, batch.score_S.tolist(), batch.group_S.tolist(), baseline=False, beta=0.1, clip=(-10.0, 10.0))
    close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_score_that_is_not_finite_stops_the_step() -> None:
    with pytest.raises(NumericsError, match="2 of 3 on rank 0"):
        compute(packed([[1, 1], [1]], [math.nan, 1.0]), estimator="reinforce_pp", reward_clip=None)


def test_a_batch_without_a_token_is_refused() -> None:
    with pytest.raises(NumericsError, match="no token to learn from"):
        compute(packed([[0, 0]], [1.0]), estimator="reinforce_pp")
