"""Sums without rounding, against rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.stats.exact import NO_EXPONENTS, ExactSums, exponent_range, read, tabulate
from tests.reference.properties import steady

# Subnormal numbers and the largest ones included: nothing here may overflow, underflow or round.
anything = st.floats(allow_nan=False, allow_infinity=False)


def _sums(values: list[float]) -> ExactSums:
    x_N = torch.tensor(values, dtype=torch.float64)
    low, high = exponent_range(x_N)
    return read(tabulate(x_N, low, high), low)


@steady
@given(st.lists(anything, max_size=20))
def test_sum_and_sum_of_squares_are_the_rational_ones(values: list[float]) -> None:
    expected = ExactSums(sum(map(Fraction, values), Fraction(0)), sum((Fraction(v) ** 2 for v in values), Fraction(0)))
    assert _sums(values) == expected


@steady
@given(st.lists(st.lists(anything, max_size=6), min_size=1, max_size=4))
def test_tables_of_parts_add_to_the_table_of_the_whole(parts: list[list[float]]) -> None:
    tensors = [torch.tensor(part, dtype=torch.float64) for part in parts]
    low, high = exponent_range(torch.cat(tensors))
    total = sum(tabulate(part, low, high) for part in tensors)
    assert torch.equal(total, tabulate(torch.cat(tensors), low, high))


@pytest.mark.parametrize("values", [[5e-324], [-5e-324, 1.7976931348623157e308], [1.0, -1.0], [2.0**-1074] * 3, [0.0, -0.0]])
def test_the_ends_of_the_number_line(values: list[float]) -> None:
    sums = _sums(values)
    assert sums.total == sum(map(Fraction, values))
    assert sums.squares == sum(Fraction(v) ** 2 for v in values)


def test_a_small_value_survives_between_two_large_ones() -> None:
    """1e16 + 1 - 1e16 is 0 in floats whenever the 1 is added to 1e16 first."""
    assert _sums([1e16, 1.0, -1e16]).total == 1


def test_a_million_equal_values_do_not_overflow_a_limb() -> None:
    value = -(2.0 - 2.0**-52)  # every bit of the mantissa set
    sums = _sums([value] * 1_000_000)
    assert sums.total == Fraction(value) * 1_000_000
    assert sums.squares == Fraction(value) ** 2 * 1_000_000


def test_nothing_has_no_exponents_and_an_empty_table() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert exponent_range(empty) == NO_EXPONENTS == exponent_range(torch.zeros(3, dtype=torch.float64))
    assert read(tabulate(empty, *NO_EXPONENTS), NO_EXPONENTS[0]) == ExactSums(Fraction(0), Fraction(0))
