"""Moments and whitening in rational arithmetic: slow, obvious, and without any rounding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

FLOOR = Fraction(1e-8)


def moments(values: Sequence[float], sequences: Sequence[int] | None = None) -> tuple[Fraction, Fraction]:
    """Mean and population variance; with sequences, each of these counts once, whatever its length."""
    names = range(len(values)) if sequences is None else sequences
    lengths = Counter(names)
    weights = [Fraction(1, lengths[name] * len(lengths)) for name in names]
    exact = [Fraction(value) for value in values]
    mean = sum((w * x for w, x in zip(weights, exact, strict=True)), Fraction(0))
    return mean, sum((w * (x - mean) ** 2 for w, x in zip(weights, exact, strict=True)), Fraction(0))


def whitened(values: Sequence[float], sequences: Sequence[int] | None = None, *, recentre: bool = True) -> list[Fraction]:
    """(x - mean) / sqrt(max(variance, 1e-8)); the root to 300 bits or more."""
    mean, variance = moments(values, sequences)
    root = square_root(max(variance, FLOOR))
    return [(Fraction(value) - (mean if recentre else 0)) / root for value in values]


def square_root(value: Fraction) -> Fraction:
    """Off by a relative 2^-300 at most."""
    shift = 2 * max(0, 320 + value.denominator.bit_length() - value.numerator.bit_length())
    return Fraction(math.isqrt((value.numerator << shift) // value.denominator), 1) / Fraction(2) ** (shift // 2)


def relative_error(got: float, exact: Fraction) -> float:
    """|got - exact| / |exact|; 0 for two zeros."""
    if exact == 0:
        return 0.0 if got == 0 else math.inf
    return float(abs(Fraction(got) - exact) / abs(exact))
