"""Sums that do not round: integer tables of mantissas by exponent.

A float64 is s * m * 2^(e - 53) with a 53-bit integer m. Adding the integers m (and m^2) of all values that share an exponent e
loses nothing, integers add in any order to the same bits, and tables of several ranks add likewise. The one rounding happens
when a finished total is turned into a float. Hence the result cannot depend on how values are split over ranks, packed or
permuted.

A table has one row for each exponent and eight int64 columns of limbs of at most 27 bits, so 2^36 values fit without overflow:
    m = hi * 2^27 + lo          columns 0, 1      sum of s * hi, sum of s * lo
    hi^2, hi * lo, lo^2         columns 2 to 7    each product cut into its upper part and its lower 27 bits
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

MANTISSA_BITS = 53
LIMB_BITS = 27
NUM_COLUMNS = 8
# An empty set of values has this range of exponents; it is the neutral element of merging ranges by min and max.
NO_EXPONENTS = (1 << 20, -(1 << 20))


@dataclass(frozen=True, slots=True)
class ExactSums:
    """The exact sum of some values, and of their squares, as rational numbers."""

    total: Fraction
    squares: Fraction


def exponent_range(x_N: Tensor) -> tuple[int, int]:
    """The smallest and largest exponent among the values that are not 0; NO_EXPONENTS when there is none.

    Shapes: x_N [N] float64, finite
    """
    exponent_N = torch.frexp(x_N[x_N != 0])[1]
    return (int(exponent_N.min()), int(exponent_N.max())) if exponent_N.numel() else NO_EXPONENTS


def tabulate(x_N: Tensor, low: int, high: int) -> Tensor:
    """The table of some values, whose exponents must all lie in [low, high].

    Shapes: x_N [N] float64, finite -> [high - low + 1, 8] int64; no row at all for NO_EXPONENTS
    """
    table = torch.zeros(max(0, high - low + 1), NUM_COLUMNS, dtype=torch.int64, device=x_N.device)
    x_N = x_N[x_N != 0]
    fraction_N, exponent_N = torch.frexp(x_N)
    mantissa_N = (fraction_N.abs() * 2.0**MANTISSA_BITS).to(torch.int64)
    sign_N = x_N.sign().to(torch.int64)
    hi_N, lo_N = _cut(mantissa_N)
    columns = [sign_N * hi_N, sign_N * lo_N, *_cut(hi_N * hi_N), *_cut(hi_N * lo_N), *_cut(lo_N * lo_N)]
    return table.index_add_(0, exponent_N.to(torch.int64) - low, torch.stack(columns, dim=1))


def read(table: Tensor, low: int) -> ExactSums:
    """The sums that a table, or the sum of several ranks' tables, stands for.

    Shapes: table [rows, 8] int64, its first row for the exponent `low`
    """
    total = squares = Fraction(0)
    for row, (s1, s0, hh1, hh0, hl1, hl0, ll1, ll0) in enumerate(table.tolist()):
        unit = Fraction(2) ** (low + row - MANTISSA_BITS)
        total += unit * _join(s1, s0)
        squares += unit * unit * ((_join(hh1, hh0) << 2 * LIMB_BITS) + (_join(hl1, hl0) << (LIMB_BITS + 1)) + _join(ll1, ll0))
    return ExactSums(total, squares)


def _cut(value_N: Tensor) -> tuple[Tensor, Tensor]:
    return value_N >> LIMB_BITS, value_N & ((1 << LIMB_BITS) - 1)


def _join(upper: int, lower: int) -> int:
    return (upper << LIMB_BITS) + lower
