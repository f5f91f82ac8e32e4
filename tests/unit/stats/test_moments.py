"""Moments and whitening in one process. What several processes make of it is in tests/dist."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rpp.errors import NumericsError
from megatron_rpp.stats.moments import Moments, distributed_moments, whiten
from megatron_rpp.stats.wire import pooled
from tests.reference.properties import steady
from tests.reference.statistics import moments as exact_moments

moderate = st.floats(-1e3, 1e3)


def _moments(values: list[float], sequences: list[int] | None = None) -> Moments:
    x_T = torch.tensor(values, dtype=torch.float64)
    sequence_T = None if sequences is None else torch.tensor(sequences)
    return distributed_moments(x_T, torch.ones_like(x_T, dtype=torch.bool), None, sequence_T=sequence_T)


def test_five_numbers_by_hand() -> None:
    """1 -1 2 4 6: mean 12 / 5 = 2.4, squares 1.96 + 11.56 + 0.16 + 2.56 + 12.96 = 29.2, variance 5.84."""
    seen = _moments([1.0, -1.0, 2.0, 4.0, 6.0])
    assert (seen.n, seen.mean, seen.min, seen.max) == (5, 2.4, -1.0, 6.0)
    assert seen.variance == pytest.approx(5.84, rel=1e-15)
    assert seen.scale == pytest.approx(1 / math.sqrt(5.84), rel=1e-15)


def test_three_sequences_by_hand() -> None:
    """0 2 | 4 | 1 1 1: means 1, 4, 1, their mean 2, their squared deviations 1 + 4 + 1 = 6; inside only the first varies, by 1.
    variance (6 + 1) / 3. By weights: tokens 1/2 1/2 | 1 | 1/3 each: (4 / 2 + 0 / 2 + 4 + 1) / 3 = 7 / 3."""
    seen = _moments([0.0, 2.0, 4.0, 1.0, 1.0, 1.0], [0, 0, 3, 7, 7, 7])
    assert (seen.n, seen.mean, seen.min, seen.max) == (3, 2.0, 0.0, 4.0)
    assert seen.variance == pytest.approx(7 / 3, rel=1e-15)


@steady
@given(st.lists(moderate, min_size=1, max_size=30))
@example([0.0, 0.0, 0.0, 0.0, 0.0, -25.0, -999.804924761043, -8.178796380499486e-206])  # the exact mean is 1e-206 beside a tie
def test_mean_and_variance_are_the_rational_ones_rounded_once(values: list[float]) -> None:
    """A value 2^-166 of the largest is lost, which can at most turn a tie."""
    exact = list(map(Fraction, values))
    mean = sum(exact) / len(exact)
    variance = float(sum((v - mean) ** 2 for v in exact) / len(exact))
    seen = _moments(values)
    assert abs(Fraction(seen.mean) + Fraction(seen.mean_tail) - mean) <= Fraction(2) ** -100 * max(map(abs, exact))
    assert abs(seen.mean - float(mean)) <= math.ulp(float(mean))
    assert abs(seen.variance - variance) <= math.ulp(variance)


@pytest.mark.parametrize(("centre", "spread"), [(1.0, 1e-8), (1e4, 1e-4), (5.0, 0.01), (1e8, 1.0)])
def test_a_small_spread_around_a_large_mean_keeps_its_digits(centre: float, spread: float) -> None:
    """centre +- spread has variance spread^2 (as far as the inputs themselves hold it); one pass in float32 gives 0 or worse."""
    low, high = centre - spread, centre + spread
    assert _moments([low, high] * 500).variance == pytest.approx(((high - low) / 2) ** 2, rel=1e-15)


@pytest.mark.parametrize("sequences", [None, [0, 0, 0, 1, 1, 2, 2]])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3, 1e-300, -5.0, 0.0])
def test_equal_values_have_no_variance_and_whiten_to_exactly_zero(value: float, sequences: list[int] | None) -> None:
    seen = _moments([value] * 7, sequences)
    assert (seen.mean, seen.variance) == (value, 0.0)
    x_T = torch.full((7,), value, dtype=torch.float64)
    population = "token" if sequences is None else "sample"
    sequence_T = torch.tensor(sequences or [0] * 7)
    out_T, _ = whiten(x_T, torch.ones(7, dtype=torch.bool), sequence_T=sequence_T, group=None, population=population)
    assert out_T.tolist() == [0.0] * 7


def test_equal_values_inside_unequal_sequences_have_exactly_their_value_as_mean() -> None:
    """Seven times 0.1 sums to 0.7 - 1e-16; the mean of that sequence must still be 0.1."""
    seen = _moments([0.1] * 7 + [0.3] * 3, [0] * 7 + [1] * 3)
    mean = (Fraction(0.1) + Fraction(0.3)) / 2
    assert seen.mean == float(mean)
    assert seen.variance == float((Fraction(0.3) - Fraction(0.1)) ** 2 / 4)


def test_noise_in_a_batch_of_equal_values_is_not_blown_up() -> None:
    """0.7 in float32 is off by 1e-8 from 0.7; the floor of 1e-8 on the variance gives at most 1e-8 / 1e-4 = 1e-4."""
    x_T = torch.tensor([0.7, 0.7000000119], dtype=torch.float64)
    out_T, _ = whiten(x_T, torch.ones(2, dtype=torch.bool), sequence_T=torch.zeros(2, dtype=torch.int64), group=None)
    assert 0 < out_T.abs().max().item() < 1e-4


def test_whitening_reads_nothing_outside_the_mask_and_leaves_zero_there() -> None:
    """On the mask 1 and 3: mean 2, variance 1."""
    x_T = torch.tensor([math.nan, 1.0, math.inf, 3.0], dtype=torch.float32)
    mask_T = torch.tensor([False, True, False, True])
    out_T, seen = whiten(x_T, mask_T, sequence_T=torch.zeros(4, dtype=torch.int64), group=None)
    assert out_T.tolist() == [0.0, -1.0, 0.0, 1.0]
    assert out_T.dtype == torch.float64
    assert seen.n == 2


def test_without_recentring_the_values_are_only_scaled() -> None:
    """1 and 3 over a deviation of 1 stay 1 and 3 (shift_mean=False of the peers would give -1 + 2 and 1 + 2)."""
    x_T = torch.tensor([1.0, 3.0, 5.0, 7.0])
    out_T, _ = whiten(x_T, torch.ones(4, dtype=torch.bool), sequence_T=torch.zeros(4, dtype=torch.int64), group=None, recentre=False)
    assert out_T.tolist() == pytest.approx([v / math.sqrt(5) for v in (1, 3, 5, 7)], rel=1e-15)


def test_without_rescaling_the_values_stay_and_are_measured_all_the_same() -> None:
    x_T, mask_T = torch.tensor([1.0, math.nan, 3.0]), torch.tensor([True, False, True])
    out_T, seen = whiten(x_T, mask_T, sequence_T=torch.zeros(3, dtype=torch.int64), group=None, rescale=False)
    assert out_T.tolist() == [1.0, 0.0, 3.0]
    assert (seen.n, seen.mean, seen.variance, out_T.dtype) == (2, 2.0, 1.0, torch.float64)


def test_each_domain_is_whitened_by_itself_and_one_without_a_token_is_skipped() -> None:
    """Domain 0: 1 3, mean 2, variance 1. Domain 2: 10 30 50 masked to 10 30, mean 20, variance 100. Together 1 3 10 30: mean 11."""
    x_T = torch.tensor([1.0, 10.0, 30.0, 50.0, 3.0])
    mask_T = torch.tensor([True, True, True, False, True])
    arguments = {"sequence_T": torch.tensor([0, 1, 1, 1, 2]), "domain_S": torch.tensor([0, 2, 0]), "group": None}
    out_T, seen = whiten(x_T, mask_T, scope="domain", num_domains=4, **arguments)
    assert out_T.tolist() == [-1.0, -1.0, 1.0, 0.0, 1.0]
    assert (seen.n, seen.mean, seen.min, seen.max) == (4, 11.0, 1.0, 30.0)
    assert [one and (one.n, one.mean, one.variance) for one in seen.domains] == [(2, 2.0, 1.0), None, (2, 20.0, 100.0), None]
    assert torch.equal(whiten(x_T, mask_T, scope="domain", **arguments)[0], out_T)
    assert not torch.equal(whiten(x_T, mask_T, **arguments)[0], out_T)


def test_domains_over_a_group_need_their_number() -> None:
    """A rank that lacks the last domain would send a shorter message than the others. Told before anything is sent."""
    nothing_T, stranger = torch.zeros(0), torch.distributed.ProcessGroup(0, 2)
    arguments = {"sequence_T": nothing_T.long(), "domain_S": nothing_T.long(), "scope": "domain"}
    with pytest.raises(ValueError, match="needs domain_S and, over a group, num_domains"):
        whiten(nothing_T, nothing_T.bool(), group=stranger, **arguments)


def test_a_gradient_does_not_pass_through_the_statistics() -> None:
    x_T = torch.tensor([1.0, 3.0], requires_grad=True)
    out_T, _ = whiten(x_T, torch.ones(2, dtype=torch.bool), sequence_T=torch.zeros(2, dtype=torch.int64), group=None)
    assert not out_T.requires_grad


@pytest.mark.parametrize("population", ["token", "sample"])
def test_half_a_step_of_a_large_mean_is_not_lost(population: str) -> None:
    """1e8, 1e8 + 2^-26 and 1e8 + 2^-25, neighbours in float64: a third of the way between two of them lies no mean of theirs, so
    a mean of one float would be off by a quarter of a deviation."""
    values = [1e8, 1e8, 1e8 + 2.0**-26]
    x_T, every_T = torch.tensor(values, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    seen = distributed_moments(x_T, every_T, None, sequence_T=None if population == "token" else torch.arange(3))
    assert Fraction(seen.mean) + Fraction(seen.mean_tail) == pytest.approx(Fraction(1e8) + Fraction(2) ** -26 / 3, rel=1e-30)
    assert seen.mean_tail != 0


@steady
@given(st.lists(moderate, min_size=1, max_size=9), st.lists(moderate, min_size=1, max_size=9))
def test_pooled_moments_are_exactly_those_of_the_whole(a: list[float], b: list[float]) -> None:
    nothing = (0, Fraction(0), Fraction(0))
    assert pooled([(len(a), *exact_moments(a)), nothing, (len(b), *exact_moments(b))]) == exact_moments(a + b)


@pytest.mark.parametrize("population", ["token", "sample"])
def test_values_that_are_not_finite_are_counted_and_refused(population: str) -> None:
    x_T = torch.tensor([1.0, math.nan, math.inf, 2.0])
    with pytest.raises(NumericsError, match=r"normalise advantages: values are not finite(.|\n)*2 of 4 on rank 0"):
        whiten(x_T, torch.ones(4, dtype=torch.bool), sequence_T=torch.tensor([0, 0, 1, 1]), group=None, population=population)


@pytest.mark.parametrize("population", ["token", "sample"])
def test_no_value_at_all_is_refused(population: str) -> None:
    none_T, sequence_T = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(NumericsError, match="no token to learn from"):
        whiten(torch.ones(3), none_T, sequence_T=sequence_T, group=None, population=population)


def test_a_variance_beyond_float64_is_refused() -> None:
    with pytest.raises(NumericsError, match="beyond float64"):
        _moments([1e200, -1e200])
