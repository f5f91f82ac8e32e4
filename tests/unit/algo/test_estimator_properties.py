"""What holds of every estimator on any batch: the loops of tests/reference, and what must not show in the result.

An example is a batch of a few short responses drawn from a seed, with holes in the masks and NaN stored in them, and settings of its
own. It costs one or two milliseconds, of which most are the calls of torch: so a property makes as few calls as it can, and leaves the
whole of compute_advantages, with what it reports, to tests/dist/test_credit.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rpp.algo.baselines import Scores
from megatron_rpp.algo.estimators import ESTIMATORS
from megatron_rpp.algo.sequences import sequence_of
from megatron_rpp.config.schema import NORMALISED, Algo
from megatron_rpp.stats.moments import whiten
from tests.reference import credit as loops
from tests.reference.cases import ESTIMATOR_NAMES, Row, algo_of, batch_of, draw, everyone, greedy_of, on_tokens, widened
from tests.reference.estimators import normalised
from tests.reference.properties import thorough

SEEDS = st.integers(0, 2**32 - 1)
Values = list[list[float]]


def raw(rows: Sequence[Row], algo: Algo, scores: Scores, dtype: torch.dtype = torch.float64) -> Values:
    batch = batch_of(rows, dtype)
    return on_tokens(ESTIMATORS[algo.estimator](batch, algo, scores), batch)


def both(rows: Sequence[Row], algo: Algo, seed: int, **stats: Any) -> tuple[Values, Values]:
    """Before and after the normalisation, which those estimators have whose paper has one."""
    batch = batch_of(rows)
    raw_T = ESTIMATORS[algo.estimator](batch, algo, everyone(rows, algo, seed))
    if algo.estimator not in NORMALISED:
        return (on_tokens(raw_T, batch),) * 2
    adv_T, _ = whiten(raw_T, batch.mask_T, sequence_T=sequence_of(batch.cu_len_S1), domain_S=batch.domain_S, group=None, **stats)
    return on_tokens(raw_T, batch), on_tokens(adv_T, batch)


def final(rows: Sequence[Row], algo: Algo, seed: int, **stats: Any) -> Values:
    return both(rows, algo, seed, **stats)[1]


def stats_of(seed: int) -> dict[str, str]:
    return {"population": ("token", "sample")[seed % 2], "scope": ("global", "domain")[seed // 2 % 2]}


def flat(values: Values) -> list[float]:
    return list(chain.from_iterable(values))


def near(got: Values, expected: Values, *, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    assert [len(row) for row in got] == [len(row) for row in expected]
    for g, e in zip(flat(got), flat(expected), strict=True):
        assert abs(g - e) <= atol + rtol * abs(e), (g, e)


def together(rows: Sequence[Row], values: Values, scope: str) -> list[Values]:
    """The rows that have a token, apart where they are normalised apart."""
    places = [{row.domain} if scope == "domain" else {0, 1} for row in rows]
    parts = [[value for place, value in zip(places, values, strict=True) if value and number in place] for number in (0, 1)]
    return [part for part in (parts if scope == "domain" else parts[:1]) if part]


@thorough
@given(SEEDS)
def test_every_estimator_equals_the_loops_of_its_paper(seed: int) -> None:
    rows, algo, stats = draw(seed), algo_of(seed), stats_of(seed)
    expected = loops.raw(rows, algo, greedy_of(seed))
    got = final(rows, algo, seed, **stats)
    if algo.estimator not in NORMALISED:
        return near(got, expected)
    for part, raw_values in zip(together(rows, got, stats["scope"]), together(rows, expected, stats["scope"]), strict=True):
        masks = [[True] * len(row) for row in raw_values]
        near(part, normalised(raw_values, masks, population=stats["population"]), rtol=1e-7, atol=1e-7)


@thorough
@given(SEEDS)
def test_order_of_rows_padding_and_holes_with_nan_do_not_show_in_the_bits(seed: int) -> None:
    rows, algo, stats = draw(seed), algo_of(seed), stats_of(seed)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    straight, wide = final(rows, algo, seed, **stats), widened(rows, seed)
    assert final([wide[i] for i in order], algo, seed, **stats) == [straight[i] for i in order]


@thorough
@given(SEEDS)
def test_what_ranks_and_microbatches_a_response_is_in_does_not_show_in_the_bits(seed: int) -> None:
    """Each part has its own few responses and everyone's scores; some parts are empty, and groups are torn apart."""
    rows, algo = draw(seed), algo_of(seed)
    rng, scores = random.Random(seed), everyone(rows, algo, seed)
    whole, part_of = raw(rows, algo, scores), [rng.randrange(3) for _ in rows]
    for part in range(3):
        mine = [i for i, its_part in enumerate(part_of) if its_part == part]
        assert raw([rows[i] for i in mine], algo, scores) == [whole[i] for i in mine]


@thorough
@given(SEEDS)
def test_a_batch_and_its_copies_have_the_same_bits(seed: int) -> None:
    """But for n - 1 in a deviation, and the others that RLOO leaves a response with."""
    names = tuple(name for name in ESTIMATOR_NAMES if name != "rloo")
    rows, algo, stats = draw(seed), algo_of(seed, names, grpo_std_unbiased=False), stats_of(seed)
    times = 2 + seed % 2
    assert final(rows * times, algo, seed, **stats) == final(rows, algo, seed, **stats) * times


@thorough
@given(SEEDS, st.floats(0.1, 100), st.floats(-5, 5))
def test_scale_and_offset_of_the_score(seed: int, scale: float, offset: float) -> None:
    """R -> scale * R + offset: nothing changes where a deviation divides, the scale alone where none does; the offset nowhere."""
    names = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")
    rows, algo = draw(seed), algo_of(seed, names, reward_clip=None, kl_reward_coef=0.0, grpo_std_eps=0.0)
    by = 1.0 if algo.estimator in ("reinforce_pp_baseline", "grpo") else scale
    mapped = [replace(row, score=row.score * scale + offset) for row in rows]
    straight = [[by * value for value in row] for row in final(rows, algo, seed)]
    near(final(mapped, algo, seed), straight, rtol=1e-8, atol=1e-8 * max(1.0, by))


@thorough
@given(SEEDS)
def test_rloo_is_k_over_k_minus_1_times_dr_grpo(seed: int) -> None:
    rows, algo = draw(seed), algo_of(seed, kl_reward_coef=0.0)
    scores = everyone(rows, algo, seed)
    loo, inclusive = (raw(rows, replace(algo, estimator=name), scores) for name in ("rloo", "dr_grpo"))
    sizes = [sum(other.group == row.group for other in rows) for row in rows]
    near(loo, [[size / (size - 1) * value for value in row] for row, size in zip(inclusive, sizes, strict=True)], rtol=1e-12, atol=1e-13)


@thorough
@given(SEEDS)
def test_a_response_without_a_token_acts_through_its_groups_mean_alone(seed: int) -> None:
    rows, algo = draw(seed), algo_of(seed)
    empty = replace(rows[0], mask=(False, False), old=(math.nan,) * 2, ref=(math.nan,) * 2, value=(math.nan,) * 2)
    scores = everyone([*rows, empty], algo, seed)
    assert raw([*rows, empty], algo, scores) == [*raw(rows, algo, scores), []]


@thorough
@given(SEEDS)
def test_bfloat16_inputs_are_upcast_before_anything_is_done_with_them(seed: int) -> None:
    def rounded(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(torch.tensor(values).bfloat16().tolist())

    rows = [replace(row, old=rounded(row.old), ref=rounded(row.ref), value=rounded(row.value)) for row in draw(seed)]
    algo = algo_of(seed)
    scores = everyone(rows, algo, seed)
    assert raw(rows, algo, scores, torch.bfloat16) == raw(rows, algo, scores)


@thorough
@given(SEEDS, st.floats(-1e3, 1e3))
def test_equal_scores_teach_exactly_nothing_whatever_they_are(seed: int, score: float) -> None:
    rows = draw(seed, score=lambda rng: score)
    names = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")
    algo = algo_of(seed, names, kl_reward_coef=0.0, grpo_std_eps=(0.0, 1e-9)[seed % 2])
    assert not any(flat(raw(rows, algo, everyone(rows, algo, seed))))


def mean_and_variance(values: Values, population: str) -> tuple[float, float]:
    weighted = [(value, 1.0 if population == "token" else 1 / len(row)) for row in values for value in row]
    total = math.fsum(weight for _, weight in weighted)
    mean = math.fsum(value * weight for value, weight in weighted) / total
    return mean, math.fsum(weight * (value - mean) ** 2 for value, weight in weighted) / total


@thorough
@given(SEEDS)
@example(103705)  # where the penalties alone differ, with a variance below the floor
def test_after_the_normalisation_mean_is_0_and_variance_1(seed: int) -> None:
    """1, or what a smaller variance is of the floor 1e-8."""
    rows, algo, stats = draw(seed), algo_of(seed, tuple(NORMALISED)), stats_of(seed)
    before_and_after = (together(rows, values, stats["scope"]) for values in both(rows, algo, seed, **stats))
    for before, got in zip(*before_and_after, strict=True):
        _, spread = mean_and_variance(before, stats["population"])
        mean, variance = mean_and_variance(got, stats["population"])
        assert mean == pytest.approx(0, abs=1e-9)
        assert variance == pytest.approx(spread / max(spread, 1e-8), rel=1e-6, abs=1e-6)
