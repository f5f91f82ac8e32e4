"""What holds of every estimator on any batch: the loops of tests/reference, and what must not show in the result.

A case is a batch of a few short responses drawn from a seed, with holes in the masks and NaN stored in them. One call takes many
cases: each has its own prompts, and the normalisation treats each as a domain. So at_least_2000_cases costs a second or two.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.advantage import NORMALISED, compute_advantages
from megatron_rpp.algo.estimators import ESTIMATORS
from megatron_rpp.config.schema import Algo
from megatron_rpp.stats.moments import whiten
from megatron_rpp.types import PackedBatch
from tests.reference import credit as loops
from tests.reference.cases import (
    CASES,
    ESTIMATOR_NAMES,
    Row,
    algo_of,
    at_least_2000_cases,
    batch_of,
    draw_many,
    everyone,
    greedy_of,
    on_tokens,
    widened,
)
from tests.reference.estimators import normalised

SEEDS = st.integers(0, 2**32 - 1)
Values = list[list[float]]


def raw(rows: Sequence[Row], algo: Algo, seed: int, batch: PackedBatch | None = None) -> Values:
    batch = batch_of(rows) if batch is None else batch
    return on_tokens(ESTIMATORS[algo.estimator](batch, algo, everyone(rows, algo, seed)), batch)


def final(rows: Sequence[Row], algo: Algo, seed: int, **stats: object) -> Values:
    """After the normalisation of each case, for the estimators whose paper has one."""
    batch = batch_of(rows)
    normaliser = partial(whiten, group=None, scope="domain", rescale=algo.estimator in NORMALISED, **stats)
    adv_T, _ = compute_advantages(batch, algo, scores=everyone(rows, algo, seed), normaliser=normaliser)
    return on_tokens(adv_T, batch)


def flat(values: Values) -> list[float]:
    return list(chain.from_iterable(values))


def near(got: Values, expected: Values, *, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    assert [len(row) for row in got] == [len(row) for row in expected]
    for g, e in zip(flat(got), flat(expected), strict=True):
        assert abs(g - e) <= atol + rtol * abs(e), (g, e)


def by_case(rows: Sequence[Row], values: Values) -> list[Values]:
    """The rows of each case that have a token."""
    return [[value for row, value in zip(rows, values, strict=True) if row.domain == case and value] for case in range(CASES)]


@at_least_2000_cases
@given(SEEDS)
def test_every_estimator_equals_the_loops_of_its_paper(seed: int) -> None:
    rows, algo = draw_many(seed), algo_of(seed)
    expected = loops.raw(rows, algo, greedy_of(seed))
    near(raw(rows, algo, seed), expected)
    if algo.estimator in NORMALISED:
        population = ("token", "sample")[seed % 2]
        for got, raw_values in zip(by_case(rows, final(rows, algo, seed, population=population)), by_case(rows, expected), strict=True):
            masks = [[True] * len(row) for row in raw_values]
            near(got, normalised(raw_values, masks, population=population), rtol=1e-7, atol=1e-7)


@at_least_2000_cases
@given(SEEDS)
def test_order_of_rows_padding_and_holes_with_nan_do_not_show_in_the_bits(seed: int) -> None:
    rows, algo = draw_many(seed), algo_of(seed)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    straight, wide = final(rows, algo, seed), widened(rows, seed)
    assert final([wide[i] for i in order], algo, seed) == [straight[i] for i in order]


@at_least_2000_cases
@given(SEEDS)
def test_what_ranks_and_microbatches_a_response_is_in_does_not_show_in_the_bits(seed: int) -> None:
    """Each part has its own few responses and everyone's scores; some parts are empty, and groups are torn apart."""
    rows, algo = draw_many(seed), algo_of(seed)
    rng, whole, scores = random.Random(seed), raw(rows, algo, seed), everyone(rows, algo, seed)
    part_of = [rng.randrange(4) for _ in rows]
    for part in range(4):
        mine = [i for i, its_part in enumerate(part_of) if its_part == part]
        batch = batch_of([rows[i] for i in mine])
        assert on_tokens(ESTIMATORS[algo.estimator](batch, algo, scores), batch) == [whole[i] for i in mine]


@at_least_2000_cases
@given(SEEDS)
def test_a_batch_and_its_copies_have_the_same_bits(seed: int) -> None:
    """But for n - 1 in a deviation, and the others that RLOO leaves a response with."""
    names = tuple(name for name in ESTIMATOR_NAMES if name != "rloo")
    rows, algo = draw_many(seed), algo_of(seed, names, grpo_std_unbiased=False)
    times = 2 + seed % 2
    assert final(rows * times, algo, seed) == final(rows, algo, seed) * times


@at_least_2000_cases
@given(SEEDS, st.floats(0.01, 100), st.floats(-5, 5))
def test_scale_and_offset_of_the_score(seed: int, scale: float, offset: float) -> None:
    """R -> scale * R + offset: nothing changes where a deviation divides, the scale alone where none does; the offset nowhere."""
    names = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")
    rows, algo = draw_many(seed), algo_of(seed, names, reward_clip=None, kl_reward_coef=0.0, grpo_std_eps=0.0)
    by = 1.0 if algo.estimator in ("reinforce_pp_baseline", "grpo") else scale
    mapped = [replace(row, score=row.score * scale + offset) for row in rows]
    straight = [[by * value for value in row] for row in final(rows, algo, seed)]
    near(final(mapped, algo, seed), straight, rtol=1e-8, atol=1e-8 * max(1.0, by))


@at_least_2000_cases
@given(SEEDS)
def test_rloo_is_k_over_k_minus_1_times_dr_grpo(seed: int) -> None:
    rows, algo = draw_many(seed), algo_of(seed, kl_reward_coef=0.0)
    loo, inclusive = (raw(rows, replace(algo, estimator=name), seed) for name in ("rloo", "dr_grpo"))
    sizes = [sum(other.group == row.group for other in rows) for row in rows]
    near(loo, [[size / (size - 1) * value for value in row] for row, size in zip(inclusive, sizes, strict=True)], rtol=1e-12, atol=1e-13)


@at_least_2000_cases
@given(SEEDS)
def test_a_response_without_a_token_acts_through_its_groups_mean_alone(seed: int) -> None:
    rows, algo = draw_many(seed), algo_of(seed)
    empty = replace(rows[0], mask=(False, False), old=(math.nan,) * 2, ref=(math.nan,) * 2, value=(math.nan,) * 2)
    scores = everyone([*rows, empty], algo, seed)
    with_row, without = batch_of([*rows, empty]), batch_of(rows)
    parts = [on_tokens(ESTIMATORS[algo.estimator](batch, algo, scores), batch) for batch in (with_row, without)]
    assert parts[0] == [*parts[1], []]


@at_least_2000_cases
@given(SEEDS)
def test_bfloat16_inputs_are_upcast_before_anything_is_done_with_them(seed: int) -> None:
    def rounded(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(torch.tensor(values).bfloat16().tolist())

    rows = [replace(row, old=rounded(row.old), ref=rounded(row.ref), value=rounded(row.value)) for row in draw_many(seed)]
    algo = algo_of(seed)
    assert raw(rows, algo, seed, batch_of(rows, torch.bfloat16)) == raw(rows, algo, seed)


@at_least_2000_cases
@given(SEEDS, st.floats(-1e3, 1e3))
def test_equal_scores_teach_exactly_nothing_whatever_they_are(seed: int, score: float) -> None:
    rows = draw_many(seed, score=lambda rng: score)
    names = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")
    algo = algo_of(seed, names, kl_reward_coef=0.0, grpo_std_eps=(0.0, 1e-9)[seed % 2])
    assert not any(flat(final(rows, algo, seed)))


@at_least_2000_cases
@given(SEEDS)
def test_after_the_normalisation_mean_is_0_and_variance_1(seed: int) -> None:
    rows, algo = draw_many(seed), algo_of(seed, tuple(NORMALISED))
    population = ("token", "sample")[seed % 2]
    both = (by_case(rows, values) for values in (final(rows, algo, seed, population=population), raw(rows, algo, seed)))
    for got, before in zip(*both, strict=True):
        weighted = [(value, 1.0 if population == "token" else 1 / len(row)) for row in got for value in row]
        total = math.fsum(weight for _, weight in weighted)
        mean = math.fsum(value * weight for value, weight in weighted) / total
        assert mean == pytest.approx(0, abs=1e-9)
        if len(set(flat(before))) > 1:
            assert math.fsum(weight * (value - mean) ** 2 for value, weight in weighted) / total == pytest.approx(1, rel=1e-6)
