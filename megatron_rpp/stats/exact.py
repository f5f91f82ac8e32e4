"""Sums that do not round, in a number of fixed length.

A float64 is m * 2^(e - 53) with a signed 53-bit integer m. This process adds the integers m and m^2 of all values that share an
exponent e, which loses nothing (`tabulate`). What it then tells the others is two integers, each of four 64-bit words, in units
that all ranks agree on from `top`, the largest exponent of the global batch (`Row` to `Sums`):

    total    sum of x      in units of 2^(top - 219)         values below 2^(top - 166) are left out
    squares  sum of x^2    in units of 2^(2 * (top - 109))   values below 2^(top - 56) are left out

A value that is not left out is a whole number of units, so the sums are exact; whether one is left out depends on the value and
on `top` alone. Hence the integers that arrive are the same for every split of the values over ranks and for every order, and so
is all that is computed from them. 2^36 values fit: 219 + 36 and 2 * 109 + 36 bits and a sign.

What is left out is too small to matter: the mean is off by less than 2^(top - 166); and where a square is left out, the range
of the values is at least 2^(top - 2), which bounds the variance of n values from below by 2^(2 * top - 5) / n, while the squares
left out have a mean below 2^(2 * top - 112): a relative 2^-71 for n = 2^36, less than float64 shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

MANTISSA_BITS = 53
LIMB_BITS = 27
TOTAL_BITS = 219
SQUARE_BITS = 109
WORDS = 8  # four for the total, four for the squares
WORD_BITS = 64
# Rows of a table: values this many binades below the largest have no part in any sum.
NUM_ROWS = TOTAL_BITS - MANTISSA_BITS + 1
PIECE = 1 << 14  # values at a time, so that what is made of them in between stays in the cache
NO_EXPONENT = -1100  # below that of every float64 but 0: of zeros, and of no value at all


@dataclass(frozen=True, slots=True)
class Row:
    """The exact sums of the mantissas, and of their squares, of values that share an exponent."""

    exponent: int
    mantissas: int
    squares: int


@dataclass(frozen=True, slots=True)
class Sums:
    """The two integers that travel, in the units that `top` gives."""

    total: int = 0
    squares: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.total + other.total, self.squares + other.squares)

    def divided(self, count: int) -> Sums:
        """Rounded towards zero, so that negated values give the negated total."""
        whole = abs(self.total) // count
        return Sums(-whole if self.total < 0 else whole, self.squares // count)

    def mean_and_variance(self, n: int, top: int) -> tuple[Fraction, Fraction]:
        """The rational mean and population variance of n values."""
        mean = Fraction(self.total, n) * Fraction(2) ** (top - TOTAL_BITS)
        return mean, max(Fraction(self.squares, n) * Fraction(4) ** (top - SQUARE_BITS) - mean * mean, Fraction(0))


def exponent_of(value: float) -> int:
    """The e of 2^(e - 1) <= |value| < 2^e; NO_EXPONENT for 0."""
    return NO_EXPONENT if value == 0 else math.frexp(value)[1]


def tabulate(x_N: Tensor, cell_N: Tensor, num_cells: int) -> list[list[Row]]:
    """The rows of each cell, its largest exponent first. Values more than 166 binades below their cell's largest have none.

    Shapes: x_N [N] float64, finite; cell_N [N] int64 in [0, num_cells)
    """
    pieces = list(zip(x_N.split(PIECE), cell_N.split(PIECE), strict=True))
    top_C = torch.full((num_cells,), NO_EXPONENT, dtype=torch.int64, device=x_N.device)
    for x, cell in pieces:
        top_C.scatter_reduce_(0, cell, _exponents(x), "amax")
    table = torch.zeros(6, num_cells * NUM_ROWS, dtype=torch.int64, device=x_N.device)
    for x, cell in pieces:
        mantissa = (torch.frexp(x)[0] * 2.0**MANTISSA_BITS).long()
        row = top_C[cell] - _exponents(x)
        is_used = row < NUM_ROWS
        _add(table, torch.where(is_used, mantissa, 0), torch.where(is_used, row, 0).add_(cell, alpha=NUM_ROWS))
    return _rows(table, top_C.tolist())


def _exponents(x_N: Tensor) -> Tensor:
    return torch.where(x_N == 0, NO_EXPONENT, torch.frexp(x_N)[1].long())


def _add(table: Tensor, mantissa_N: Tensor, place_N: Tensor) -> None:
    """Adds limbs of m (two) and of m^2 (four), highest first, to the table's columns [6, places].

    m = hi * 2^27 + lo, with hi negative where m is. Each summand is below 2^28, so 2^35 of them fit.
    """
    hi_N, lo_N = _cut(mantissa_N)
    high, upper = _cut(hi_N * hi_N)
    middle, lower = _cut(2 * hi_N * lo_N)
    low, lowest = _cut(lo_N * lo_N)
    for column, limb_N in zip(table, (hi_N, lo_N, high, upper + middle, lower + low, lowest), strict=True):
        column.index_add_(0, place_N, limb_N)


def _rows(table: Tensor, tops: Sequence[int]) -> list[list[Row]]:
    rows: list[list[Row]] = [[] for _ in tops]
    filled = table.any(dim=0).nonzero().flatten()
    for place, columns in zip(filled.tolist(), table[:, filled].t().tolist(), strict=True):
        cell, row = divmod(place, NUM_ROWS)
        rows[cell].append(Row(tops[cell] - row, _join(columns[:2]), _join(columns[2:])))
    return rows


def _cut(value_N: Tensor) -> tuple[Tensor, Tensor]:
    return value_N >> LIMB_BITS, value_N & ((1 << LIMB_BITS) - 1)


def _join(limbs: Sequence[int]) -> int:
    value = 0
    for limb in limbs:
        value = (value << LIMB_BITS) + limb
    return value


def sums_of(rows: Sequence[Row], top: int) -> Sums:
    """The rows' sums in the units of `top`, which is no smaller than any row's exponent."""
    total = squares = 0
    for row in rows:
        shift = row.exponent - MANTISSA_BITS - top
        if shift + TOTAL_BITS >= 0:
            total += row.mantissas << (shift + TOTAL_BITS)
        if shift + SQUARE_BITS >= 0:
            squares += row.squares << (2 * (shift + SQUARE_BITS))
    return Sums(total, squares)


def to_words(sums: Sums) -> list[int]:
    """Eight signed 64-bit words, highest first."""
    return [word for value in (sums.total, sums.squares) for word in _words(value)]


def from_words(words: Sequence[int]) -> Sums:
    """What `to_words` was given."""
    half = WORDS // 2
    return Sums(_number(words[:half]), _number(words[half:]))


def _words(value: int) -> list[int]:
    size = WORDS // 2 * WORD_BITS // 8
    content = value.to_bytes(size, "big", signed=True)
    return [int.from_bytes(content[i : i + 8], "big", signed=True) for i in range(0, size, 8)]


def _number(words: Sequence[int]) -> int:
    return int.from_bytes(b"".join(word.to_bytes(8, "big", signed=True) for word in words), "big", signed=True)
