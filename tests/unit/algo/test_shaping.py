"""What truncation and length do to scores and masks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.baselines import group_mean_baseline
from megatron_rpp.algo.shaping import drop_truncated, overlong_penalty, shape_batch, shape_scores, shaped
from megatron_rpp.config.schema import Reward
from tests.reference import credit as loops
from tests.reference.cases import batch_of, draw, scores_of
from tests.reference.properties import thorough

DAPO = Reward(overlong_frac=0.2, overlong_penalty=1.0)


def test_dapos_penalty_by_hand() -> None:
    """The last 4096 of 20480 tokens: nothing up to 16384, half in their middle, all at the end, no more beyond it."""
    penalty_S = overlong_penalty(torch.tensor([16000, 16384, 16385, 18432, 20479, 20480, 20481]), DAPO, max_tokens=20480)
    assert penalty_S.tolist() == pytest.approx([0.0, 0.0, 1 / 4096, 0.5, 4095 / 4096, 1.0, 1.0], abs=1e-12)


def test_the_penalty_is_taken_off_before_the_group_is_compared() -> None:
    """Two right, two wrong, one of each too long by half or wholly: 1, .5, -1, -2, mean -3/8."""
    lengths = torch.tensor([10, 95, 10, 100])
    score_S = shaped(
        torch.tensor([1.0, 1.0, -1.0, -1.0]), lengths, torch.zeros(4, dtype=torch.bool), Reward(overlong_frac=0.1), max_tokens=100
    )
    assert score_S.tolist() == [1.0, 0.5, -1.0, -2.0]
    scores = replace(scores_of([]), score_S=score_S, group_S=torch.zeros(4, dtype=torch.int64))
    assert (score_S - group_mean_baseline(scores, scores.group_S)).tolist() == [1.375, 0.875, -0.625, -1.625]


def test_stop_properly_scales_and_replacement_replaces() -> None:
    """With -1 for wrong, a coefficient of 0 lifts a wrong answer for being cut off; a replacement does not (ProRL has 0 and 1)."""
    score_S, cut_S = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([True, True, False])
    lengths = torch.tensor([5, 5, 5])
    assert shaped(score_S, lengths, cut_S, Reward(truncated_coef=0.0), max_tokens=5).tolist() == [0.0, 0.0, -1.0]
    assert shaped(score_S, lengths, cut_S, Reward(truncated_coef=0.5), max_tokens=5).tolist() == [0.5, -0.5, -1.0]
    assert shaped(score_S, lengths, cut_S, Reward(truncated_score=-1.0), max_tokens=5).tolist() == [-1.0, -1.0, -1.0]


def test_the_longest_response_is_not_taken_for_a_truncated_one() -> None:
    """It may have ended by itself on the last token it was allowed (AReaL compares lengths)."""
    score_S = shaped(torch.tensor([1.0]), torch.tensor([5]), torch.tensor([False]), Reward(truncated_coef=0.0), max_tokens=5)
    assert score_S.tolist() == [1.0]


def test_without_settings_a_score_keeps_its_bits() -> None:
    score_S = torch.tensor([0.1, 1e300, -0.7], dtype=torch.float64)
    assert shaped(score_S, torch.tensor([1, 2, 9]), torch.tensor([True] * 3), Reward(), max_tokens=3).tolist() == score_S.tolist()


def test_scores_without_lengths_cannot_be_shaped() -> None:
    with pytest.raises(ValueError, match="lengths_S"):
        shape_scores(replace(scores_of([]), lengths_S=None), DAPO, max_tokens=5)


@thorough
@given(st.integers(0, 2**32 - 1))
def test_everyones_scores_and_a_ranks_batch_are_shaped_alike_and_as_the_loop(seed: int) -> None:
    """The same bits on both ways, or a response would not be among its group's."""
    rows, rng = draw(seed), random.Random(seed)
    cache = rng.randint(0, 4)
    reward = Reward(overlong_frac=cache / 5, overlong_penalty=rng.choice((1.0, 0.5)), truncated_coef=rng.choice((None, 0.0, 0.3)))
    batch = shape_batch(batch_of(rows), reward, max_tokens=5)
    assert batch.score_S.tolist() == shape_scores(scores_of(rows), reward, max_tokens=5).score_S.tolist()
    for row, score in zip(rows, batch.score_S.tolist(), strict=True):
        kept = row.score * reward.truncated_coef if row.is_truncated and reward.truncated_coef is not None else row.score
        penalty = loops.overlong(row.length, max_tokens=5, cache=cache, factor=reward.overlong_penalty) if cache else 0.0
        assert score == pytest.approx(kept - penalty, rel=1e-12, abs=1e-12)


@thorough
@given(st.integers(0, 2**32 - 1))
def test_truncated_responses_lose_their_mask_and_nothing_else(seed: int) -> None:
    rows = draw(seed)
    batch = batch_of(rows)
    kept = drop_truncated(batch)
    assert kept.mask_T.tolist() == [flag and not row.is_truncated for row in rows for flag in row.mask]
    assert kept.score_S.tolist() == batch.score_S.tolist()
