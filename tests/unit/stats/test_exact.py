"""Sums without rounding, against rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.stats import exact
from megatron_rpp.stats.exact import NO_EXPONENT, WORDS, Row, Sums, exponent_of, from_words, sums_of, tabulate, to_words
from tests.reference.properties import steady

# Subnormal numbers and the largest ones included: nothing here may overflow or underflow.
anything = st.floats(allow_nan=False, allow_infinity=False)


def _rows(values: list[float]) -> list[Row]:
    return tabulate(torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.int64), 1)[0]


def _sums(values: list[float], top: int | None = None) -> tuple[Fraction, Fraction]:
    """Sum and sum of squares as rational numbers, through the words that travel."""
    top = max(map(exponent_of, values), default=NO_EXPONENT) if top is None else top
    sums = from_words(to_words(sums_of(_rows(values), top)))
    return sums.total * Fraction(2) ** (top - exact.TOTAL_BITS), sums.squares * Fraction(4) ** (top - exact.SQUARE_BITS)


def _kept(values: list[float], binades: int) -> list[Fraction]:
    top = max(map(exponent_of, values), default=NO_EXPONENT)
    return [Fraction(value) for value in values if exponent_of(value) >= top - binades]


@steady
@given(st.lists(anything, max_size=12))
def test_sum_and_sum_of_squares_are_the_rational_ones_of_the_values_that_are_kept(values: list[float]) -> None:
    total, squares = _sums(values)
    assert total == sum(_kept(values, 166), Fraction(0))
    assert squares == sum((value**2 for value in _kept(values, 56)), Fraction(0))


@steady
@given(st.lists(st.lists(anything, max_size=5), min_size=1, max_size=4))
def test_sums_of_parts_add_to_the_sums_of_the_whole(parts: list[list[float]]) -> None:
    whole = [value for part in parts for value in part]
    top = max(map(exponent_of, whole), default=NO_EXPONENT)
    assert sum((sums_of(_rows(part), top) for part in parts), Sums()) == sums_of(_rows(whole), top)


@pytest.mark.parametrize("values", [[5e-324], [-5e-324, 3e-324, 1e-310], [1e308, 1.7e308], [1.0, -1.0], [2.0**-1074] * 3, [0.0, -0.0], []])
def test_the_ends_of_the_number_line(values: list[float]) -> None:
    assert _sums(values) == (sum(map(Fraction, values)), sum(Fraction(v) ** 2 for v in values))


def test_a_small_value_survives_between_two_large_ones() -> None:
    """1e16 + 1 - 1e16 is 0 in floats whenever the 1 is added to it first; here 1e-19 does so between two 1e30, 49 decades above."""
    assert _sums([1e16, 1.0, -1e16])[0] == 1
    assert _sums([1e30, 1e-19, -1e30])[0] == Fraction(1e-19)
    assert _sums([1e30, 1e-21, -1e30])[0] == 0  # one of the 2^-166 that the module speaks of


def test_a_million_equal_values_do_not_overflow_a_limb() -> None:
    value = -(2.0 - 2.0**-52)  # every bit of the mantissa set
    assert _sums([value] * 1_000_000) == (Fraction(value) * 1_000_000, Fraction(value) ** 2 * 1_000_000)


def test_the_largest_sums_that_the_module_promises_fit_the_words() -> None:
    """2^36 values just below 2^top: totals of 2^255, squares of 2^254; one more binade of values would not fit."""
    [row] = _rows([-1.0 + 2.0**-53])
    full = sums_of([Row(row.exponent, row.mantissas << 36, row.squares << 36)], row.exponent)
    words = to_words(full)
    assert len(words) == WORDS
    assert all(-(2**63) <= word < 2**63 for word in words)
    assert from_words(words) == full
    with pytest.raises(OverflowError):
        to_words(sums_of([Row(row.exponent, row.mantissas << 37, row.squares << 37)], row.exponent))


def test_cells_are_kept_apart() -> None:
    x_N = torch.tensor([1.0, 2.0, 1e40, -3.0], dtype=torch.float64)
    cells = tabulate(x_N, torch.tensor([2, 0, 1, 0]), 4)
    values = [sums_of(rows, 134) for rows in cells]
    unit = Fraction(2) ** (134 - exact.TOTAL_BITS)
    assert [one.total * unit for one in values] == [-1, 1e40, 1, 0]


def test_a_division_rounds_towards_zero_on_both_sides() -> None:
    assert Sums(7, 7).divided(2) == Sums(3, 3)
    assert Sums(-7, 7).divided(2) == Sums(-3, 3)
