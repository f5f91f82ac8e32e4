"""How statistics travel between ranks: a header that all agree on, then the sums, in one of three forms.

Both go by all_gather: nothing is added up on the way, each rank decodes what came and adds it itself, without rounding. So all
ranks get the same bits, whichever form is chosen.

    fp64  the integers of exact.py: 64 bytes a statistic. The same bits for every split of the values over ranks.
    fp32  mean and variance of each rank's own values as float32: 8 bytes.
    fp8   the same two numbers as `limbs` E4M3 numbers each: 2 * limbs bytes.

The two lossy forms send a_r = (mean_r - centre) / 2^reach and v_r = variance_r / 2^spread, numbers in [-1, 1]; centre, reach and
spread follow from the headers, hence are the same on every rank. What comes out depends on the split: each rank's numbers are
rounded by themselves.

A limb takes what is left of the number, times 2^8, to the nearest E4M3 value (three bits after the leading one, at most
2^8 here), and leaves at most half a step of 2^4: 2^-5 of the number's range. The next limb takes that, times 2^5. So k limbs are
off by at most rho = 2^(-5 k), and some numbers are off by just that. For float32 rho = 2^-25 by the same argument. (The number
itself is the exact one rounded to float64 before, which adds 2^-54.)

From that to advantages. With s^2 = max(variance, 1e-8), r = 2^reach * rho / s and q = 2^spread * rho / s^2:
    |mean' - mean| <= r * s                                  the weights of the ranks are exact and add to 1
    |variance' - variance| <= (q + 2 * r + r^2) * s^2 = t * s^2
        the rank's own variances by q; the variance of the ranks' means by 2 * s * (r * s) + (r * s)^2 (Cauchy, Schwarz)
    |adv' - adv| <= stretch * |adv| + shift,   stretch = 1 / sqrt(1 - t) - 1,   shift = r * (1 + stretch)
where s is not known before the sums are, the headers bound it from below: by the ranks' own variances, and by the range.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from megatron_rpp.stats.exact import WORDS, Sums, exponent_of, from_words, to_words
from megatron_rpp.stats.local import Local

WireName = Literal["fp64", "fp32", "fp8"]
# On the variance, hence 1e-4 on the deviation: float32 noise in a batch of equal values must not be blown up to order 1.
VARIANCE_FLOOR = 1e-8
TOLERANCE = 1e-6  # what the default number of limbs keeps |adv' - adv| / max(|adv|, 1) within
BITS_PER_LIMB = 5
MAX_LIMBS = 8  # 40 bits; so many add up in float64 without rounding
HEADER_WORDS = 6
NO_VARIANCE = -(1 << 20)  # as an exponent
E4M3_TOP = 8  # a number in [-1, 1] is scaled by 2^8; E4M3 ends at 448
# The distance of neighbouring E4M3 values in [2^(e - 1), 2^e), for e from -5 to 9; below all of these it is the first.
SMALLEST_E = -5
STEPS = torch.tensor([2.0 ** (e - 4) for e in range(SMALLEST_E, 10)], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Header:
    """What a rank says first of one statistic: six 64-bit words. spread: 2^(spread - 1) <= its own variance < 2^spread."""

    num_finite: int
    num_bad: int
    low: float
    high: float
    units: int
    spread: int

    @classmethod
    def of(cls, local: Local, wire: Wire) -> Header:
        # The exact form needs no scale for the variance, and its sums are not known before `top` is.
        variance = Fraction(0) if wire.name == "fp64" else local.mean_and_variance()[1]
        spread = _exponent_of_fraction(variance) if variance > 0 else NO_VARIANCE
        return cls(local.num_finite, local.num_bad, local.low, local.high, local.units, spread)

    def words(self) -> list[int]:
        return [self.num_finite, self.num_bad, *struct.unpack("<qq", struct.pack("<dd", self.low, self.high)), self.units, self.spread]

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Header:
        low, high = struct.unpack("<dd", struct.pack("<qq", *words[2:4]))
        return cls(words[0], words[1], low, high, words[4], words[5])


@dataclass(frozen=True, slots=True)
class Agreed:
    """What follows from all ranks' headers of one statistic that has a value somewhere; the same on each."""

    headers: tuple[Header, ...]

    @property
    def n(self) -> int:
        return sum(header.units for header in self.headers)

    @property
    def num_finite(self) -> int:
        return sum(header.num_finite for header in self.headers)

    @property
    def low(self) -> float:
        return min(header.low for header in self.headers)

    @property
    def high(self) -> float:
        return max(header.high for header in self.headers)

    @property
    def top(self) -> int:
        return max(exponent_of(self.low), exponent_of(self.high))

    @property
    def centre(self) -> float:
        """Halfway between the smallest and the largest value; between them in floats too."""
        return self.low / 2 + self.high / 2 if self.low < self.high else self.low

    @property
    def reach(self) -> int:
        """Every value, hence every rank's mean, is within 2^reach of the centre."""
        farthest = max(Fraction(self.high) - Fraction(self.centre), Fraction(self.centre) - Fraction(self.low))
        return _exponent_of_fraction(farthest) if farthest else 0

    @property
    def spread(self) -> int:
        """Every rank's variance is below 2^spread; of no variance anywhere any scale will do."""
        return max(0 if self._is_flat else header.spread for header in self.headers)

    @property
    def _is_flat(self) -> bool:
        """No rank's own values differ."""
        return all(header.spread == NO_VARIANCE for header in self.headers)

    def bound(self, rho: float) -> tuple[float, float]:
        """(stretch, shift) of the module's note for numbers in [-1, 1] that are off by at most rho. In units of 2^reach."""
        if rho == 0 or self.low == self.high:
            return 0.0, 0.0  # nothing is rounded, or only zeros are sent
        reach = self.reach
        inside = sum(math.ldexp(header.units / self.n, max(header.spread - 1 - 2 * reach, -2000)) for header in self.headers)
        # Of the range's two ends, each weighing at least 1 / n or, in a sequence, 1 / (sequences * its values).
        weight = 1 / self.n if self.n == self.num_finite else 1 / (self.n * self.num_finite)
        across = float((Fraction(self.high) - Fraction(self.low)) / Fraction(2) ** reach) ** 2 * weight / 2
        floor = math.ldexp(VARIANCE_FLOOR, min(-2 * reach, 1000))
        deviation = math.sqrt(max(inside, across, floor))
        r = rho / deviation
        own = 0.0 if self._is_flat else math.ldexp(1.0, max(self.spread - 2 * reach, -2000))
        t = rho * own / deviation**2 + 2 * r + r * r
        stretch = 1 / math.sqrt(1 - t) - 1 if t < 1 else math.inf
        return stretch, r * (1 + stretch)


@dataclass(frozen=True, slots=True)
class Wire:
    """One of the three forms; limbs None: as many as keep advantages within 1e-6, which the headers tell."""

    name: WireName = "fp64"
    limbs: int | None = None

    def __post_init__(self) -> None:
        if self.limbs is not None and not 1 <= self.limbs <= MAX_LIMBS:
            raise ValueError(f"limbs must be from 1 to {MAX_LIMBS}, not {self.limbs}")

    def settled(self, agreed: Sequence[Agreed]) -> Wire:
        """The same with a number of limbs, the fewest that hold the tolerance for every statistic."""
        if self.name != "fp8" or self.limbs is not None:
            return self
        enough = (k for k in range(1, MAX_LIMBS) if all(sum(one.bound(_rho_of(k))) <= TOLERANCE for one in agreed))
        return Wire("fp8", next(enough, MAX_LIMBS))

    @property
    def rho(self) -> float:
        """How far off a number in [-1, 1] is at most; 0 where none is sent."""
        return {"fp64": 0.0, "fp32": 2.0**-25 + 2.0**-54, "fp8": _rho_of(self.limbs or MAX_LIMBS)}[self.name]

    def encode(self, locals_: Sequence[Local], agreed: Sequence[Agreed]) -> Tensor:
        """What this rank sends, one row a statistic: [D, 8] int64, [D, 2] float32 or [D, 2, limbs] uint8, the bytes of E4M3."""
        if self.name == "fp64":
            words = [to_words(local.sums(one.top)) for local, one in zip(locals_, agreed, strict=True)]
            return torch.tensor(words, dtype=torch.int64).reshape(-1, WORDS)
        numbers = [_relative(local, one) for local, one in zip(locals_, agreed, strict=True)]
        number_D2 = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 2)
        return number_D2.float() if self.name == "fp32" else to_limbs(number_D2, self.limbs)

    def decode(self, parts: Sequence[Tensor], agreed: Sequence[Agreed]) -> list[tuple[Fraction, Fraction]]:
        """Mean and variance of each statistic from what all ranks sent, in rank order."""
        if self.name == "fp64":
            sums = [sum(map(from_words, rows), Sums()) for rows in zip(*(part.tolist() for part in parts), strict=True)]
            return [one.mean_and_variance(each.n, each.top) for one, each in zip(sums, agreed, strict=True)]
        numbers = [(part.double() if self.name == "fp32" else from_limbs(part)).tolist() for part in parts]
        return [_merged(rows, one) for rows, one in zip(zip(*numbers, strict=True), agreed, strict=True)]


def _rho_of(limbs: int) -> float:
    return 2.0 ** (-BITS_PER_LIMB * limbs) + 2.0**-54


def to_limbs(number: Tensor, limbs: int) -> Tensor:
    """Numbers in [-1, 1] as E4M3 bytes, the most significant limb first; off by at most 2^(-5 * limbs).

    Shapes: [...] float64 -> [..., limbs] uint8
    """
    rest, found = number * 2.0**E4M3_TOP, []
    for _ in range(limbs):
        # Rounding from float64 to E4M3 in one step, half to even: the cast goes by way of float32 and would round twice.
        step = STEPS[torch.frexp(rest)[1].clamp_(min=SMALLEST_E).long() - SMALLEST_E]
        limb = torch.round(rest / step) * step
        found.append(limb.float().to(torch.float8_e4m3fn))
        rest = (rest - limb) * 2.0**BITS_PER_LIMB
    return torch.stack([limb.view(torch.uint8) for limb in found], dim=-1)


def from_limbs(limbs: Tensor) -> Tensor:
    """The numbers that E4M3 bytes stand for, added up without rounding. Shapes: [..., limbs] uint8 -> [...] float64."""
    value = limbs.contiguous().view(torch.float8_e4m3fn).double()
    unit = torch.tensor([2.0 ** (-BITS_PER_LIMB * place - E4M3_TOP) for place in range(limbs.shape[-1])], dtype=torch.float64)
    return (value * unit).sum(-1)


def _relative(local: Local, agreed: Agreed) -> tuple[float, float]:
    if not local.units:
        return 0.0, 0.0
    mean, variance = local.mean_and_variance()
    return float((mean - Fraction(agreed.centre)) / Fraction(2) ** agreed.reach), float(variance / Fraction(2) ** agreed.spread)


def _merged(numbers: Sequence[Sequence[float]], agreed: Agreed) -> tuple[Fraction, Fraction]:
    """The moments of the whole from those of the ranks, in rational arithmetic, so in any order."""
    reach, spread = Fraction(2) ** agreed.reach, Fraction(2) ** agreed.spread
    parts = [
        (header.units, Fraction(mean) * reach, Fraction(variance) * spread)
        for header, (mean, variance) in zip(agreed.headers, numbers, strict=True)
    ]
    offset, variance = pooled(parts)
    return Fraction(agreed.centre) + offset, variance


def pooled(parts: Sequence[tuple[int, Fraction, Fraction]]) -> tuple[Fraction, Fraction]:
    """Mean and variance of several sets together, from (n, mean, variance) of each; exact, so in any order.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    n = sum(part[0] for part in parts)
    mean = sum((size * centre for size, centre, _ in parts), Fraction(0)) / n
    return mean, sum((size * (variance + (centre - mean) ** 2) for size, centre, variance in parts), Fraction(0)) / n


def _exponent_of_fraction(value: Fraction) -> int:
    """The e of 2^(e - 1) <= value < 2^e."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e + 1 if value >= Fraction(2) ** e else e
