"""What one rank has of each statistic, before anything travels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from megatron_rpp.stats.exact import NO_EXPONENT, Row, Sums, exponent_of, sums_of, tabulate


@dataclass(frozen=True, slots=True)
class Local:
    """This rank's values of one statistic.

    units: what the population counts, values or the sequences that have one. cells: the rows of each unit of weight with the
    number of values to divide by; of the token population a single cell, divided by 1, of the sample population one a sequence.
    """

    num_finite: int
    num_bad: int
    low: float
    high: float
    units: int
    cells: tuple[tuple[Sequence[Row], int], ...]

    def sums(self, top: int) -> Sums:
        """The two integers to tell the others, in the units of `top`.

        With sequences as units each one's own sums are divided by its length first, rounded to a whole unit towards zero: a
        function of that sequence and of `top` alone, so it is the same on whichever rank the sequence lies.
        """
        return sum((sums_of(rows, top).divided(count) for rows, count in self.cells), Sums())

    def mean_and_variance(self) -> tuple[Fraction, Fraction]:
        """Of this rank's values alone; 0 and 0 where it has none."""
        top = max(exponent_of(self.low), exponent_of(self.high)) if self.units else NO_EXPONENT
        return self.sums(top).mean_and_variance(max(self.units, 1), top)


def collect(x_T: Tensor, mask_T: Tensor, sequence_T: Tensor | None, domain_T: Tensor | None, *, num_domains: int) -> list[Local]:
    """One entry for each domain, in order of their numbers.

    sequence_T None: the token population. domain_T None: everything is domain 0.
    Shapes: x_T [T] any float dtype, mask_T [T] bool, sequence_T [T] int64 ascending, domain_T [T] int64 in [0, num_domains)
    """
    is_finite_T = mask_T & x_T.isfinite()
    x_N = x_T.detach()[is_finite_T].double()
    domain_N = torch.zeros(x_N.shape, dtype=torch.int64, device=x_N.device) if domain_T is None else domain_T[is_finite_T]
    size_D = domain_N.bincount(minlength=num_domains).tolist()
    bad_T = mask_T & ~is_finite_T
    bad_D = [int(bad_T.sum())] if domain_T is None else domain_T[bad_T].bincount(minlength=num_domains).tolist()
    low_D, high_D = (_extremes(x_N, domain_N, num_domains, which) for which in ("amin", "amax"))
    if sequence_T is None:
        cells_D = [((rows, 1),) for rows in tabulate(x_N, domain_N, num_domains)]
        return [Local(*fields) for fields in zip(size_D, bad_D, low_D, high_D, size_D, cells_D, strict=True)]
    _, cell_N, length_C = sequence_T[is_finite_T].unique_consecutive(return_inverse=True, return_counts=True)
    cells = list(zip(tabulate(x_N, cell_N, length_C.numel()), length_C.tolist(), strict=True))
    home_C = domain_N[length_C.cumsum(0) - 1].tolist()
    cells_D = [tuple(cell for cell, home in zip(cells, home_C, strict=True) if home == domain) for domain in range(num_domains)]
    return [Local(*fields) for fields in zip(size_D, bad_D, low_D, high_D, map(len, cells_D), cells_D, strict=True)]


def _extremes(x_N: Tensor, domain_N: Tensor, num_domains: int, which: str) -> list[float]:
    neutral = {"amin": math.inf, "amax": -math.inf}[which]
    found_D = torch.full((num_domains,), neutral, dtype=torch.float64, device=x_N.device).scatter_reduce_(0, domain_N, x_N, which)
    # + 0.0 makes one zero of the two, so that the bits of a range do not depend on the sign of a zero.
    return (found_D + 0.0).tolist()
