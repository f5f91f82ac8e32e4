"""Mean and variance over the tokens of all ranks, and the normalisation made of them.

The mean and the variance are the correctly rounded values of the exact rational results (see exact.py). They are therefore
the same bits for every number of ranks, every split of the rows over ranks, every order of rows, on any device. For the
token population that is a proof: only integers cross ranks. For the sample population it rests on the two moments of a
single response, which are float64 sums over that response's own tokens in their order; a response is never split over
ranks, so these too are the same wherever it lies, as long as it is computed on the same kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S, all_gather, sum_int64
from megatron_rpp.dist.groups import ProcessGroup
from megatron_rpp.errors import NumericsError
from megatron_rpp.stats.exact import NUM_COLUMNS, ExactSums, exponent_range, read, tabulate

# On the variance, hence 1e-4 on the deviation: float32 noise in a batch of equal values must not be blown up to order 1.
VARIANCE_FLOOR = 1e-8


@dataclass(frozen=True, slots=True)
class Moments:
    """n values, their mean, their population variance, and their range.

    With the sample population n counts responses, mean and variance weigh every response 1 and its tokens equally within
    it; min and max are of single tokens all the same.
    """

    n: int
    mean: float
    variance: float
    min: float = -math.inf
    max: float = math.inf

    @property
    def m2(self) -> float:
        """The sum of squared deviations from the mean."""
        return self.variance * self.n

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    @property
    def scale(self) -> float:
        """What whitening multiplies by: 1 / sqrt(max(variance, 1e-8))."""
        return 1.0 / math.sqrt(max(self.variance, VARIANCE_FLOOR))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets put together, from their moments alone; for values that are no longer there.

    delta = b.mean - a.mean;  mean = a.mean + delta * b.n / n;  m2 = a.m2 + b.m2 + delta^2 * a.n * b.n / n
    Source: Chan, Golub, LeVeque (1979). Rounds, so its bits depend on the order; distributed_moments does not use it.
    """
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n, delta = a.n + b.n, b.mean - a.mean
    return Moments(
        n=n,
        mean=a.mean + delta * b.n / n,
        variance=(a.m2 + b.m2 + delta * delta * a.n * b.n / n) / n,
        min=min(a.min, b.min),
        max=max(a.max, b.max),
    )


def distributed_moments(
    x_T: Tensor,
    mask_T: Tensor,
    group: ProcessGroup | None,
    *,
    sequence_T: Tensor | None = None,
    name: str = "moments",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Moments:
    """The moments of the masked values of all ranks of a group; equal bits on each. Two collectives, entered by every rank.

    sequence_T None: the token population, each masked value counts once.
        mean = sum x / n;  variance = sum (x - mean)^2 / n
    sequence_T given: the sample population, each sequence with a masked token counts once. With mean_i and var_i the
    population moments of the masked values of sequence i,
        mean = sum_i mean_i / n;  variance = (sum_i (mean_i - mean)^2 + sum_i var_i) / n

    group None: this process alone, no collective (not torch's None, which would be everybody).
    Shapes: x_T [T] any float dtype, mask_T [T] bool, sequence_T [T] int64 ascending
    Raises: NumericsError on every rank alike when no rank has a masked value, or when one is not finite.
    """
    # Values that are not finite are counted, told to every rank, and then refused by all of them together.
    finite_T = mask_T & x_T.isfinite()
    x_N = x_T.detach()[finite_T].double()
    bad = int(mask_T.sum()) - x_N.numel()
    vectors = [x_N] if sequence_T is None else _moments_of_sequences(x_N, sequence_T[finite_T])
    headers = _exchange_headers(_header(x_N, bad, vectors), group, name=name, deadline_s=deadline_s)
    _refuse(headers, name)
    sums = _exchange_tables(vectors, headers, group, name=name, deadline_s=deadline_s)
    low, high = min(header.low for header in headers), max(header.high for header in headers)
    n = sum(header.lengths[0] for header in headers)
    return _finish(n, sums, low, high)


def whiten(
    x_T: Tensor,
    mask_T: Tensor,
    *,
    sequence_T: Tensor,
    group: ProcessGroup | None,
    population: Literal["token", "sample"] = "token",
    recentre: bool = True,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> tuple[Tensor, Moments]:
    """Masked values brought to mean 0 and variance 1 over all ranks; exactly 0 elsewhere.

    out[t] = (x[t] - mean) / sqrt(max(variance, 1e-8)) where mask[t], else 0; without recentre (x[t] / sqrt(...)), the variance
    still being that about the mean.
    population: token counts every masked value once, sample every sequence once.
    group: ranks that hold different sequences. Should it hold some of them twice, on each of several context-parallel ranks,
    only the reported n grows: mean and variance of exact multiples are the same bits.

    Shapes: x_T [T], mask_T [T] bool, sequence_T [T] int64 -> [T] float64
    Units: deadline_s in seconds, for each of the two collectives.
    Raises: NumericsError on every rank alike when no rank has a masked value, or when one is not finite; DeadlineError when a
    peer does not come.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 5. Population variance and floor as OpenRLHF; verl, slime use n - 1 and var + 1e-8.
    Without recentre it scales the raw values; the peers' shift_mean=False adds the mean back after scaling (slime#1369).
    """
    by_sequence = {"token": None, "sample": sequence_T}[population]
    moments = distributed_moments(x_T, mask_T, group, sequence_T=by_sequence, name="normalise advantages", deadline_s=deadline_s)
    centre = moments.mean if recentre else 0.0
    zero_T = torch.zeros(x_T.shape, dtype=torch.float64, device=x_T.device)
    # Not a multiplication by the mask: NaN * 0 is NaN.
    return torch.where(mask_T, (x_T.detach().double() - centre) * moments.scale, zero_T), moments


@dataclass(frozen=True, slots=True)
class _Header:
    """What a rank says before the tables are made: how much it has, and which exponents the tables must hold."""

    num_finite: int
    bad: int
    low: float
    high: float
    lengths: tuple[int, ...]
    exponents: tuple[tuple[int, int], ...]


def _header(x_N: Tensor, bad: int, vectors: Sequence[Tensor]) -> Tensor:
    bounds = torch.stack([x_N.min(), x_N.max()]) if x_N.numel() else x_N.new_tensor([math.inf, -math.inf])
    # +0.0 makes one zero of the two, so that the bits of a range do not depend on the sign of a zero.
    words = [torch.tensor([x_N.numel(), bad]), (bounds.cpu() + 0.0).view(torch.int64)]
    words += [torch.tensor([vector.numel(), *exponent_range(vector)]) for vector in vectors]
    return torch.cat(words).to(x_N.device)


def _exchange_headers(mine: Tensor, group: ProcessGroup | None, *, name: str, deadline_s: float) -> list[_Header]:
    parts = [mine] if group is None else all_gather(mine, group, name=f"{name}: sizes", deadline_s=deadline_s)
    headers = []
    for words in (part.cpu() for part in parts):
        low, high = words[2:4].view(torch.float64).tolist()
        lengths, lowest, highest = words[4:].reshape(-1, 3).t().tolist()
        exponents = tuple(zip(lowest, highest, strict=True))
        headers.append(_Header(int(words[0]), int(words[1]), low, high, tuple(lengths), exponents))
    return headers


def _exchange_tables(
    vectors: Sequence[Tensor], headers: Sequence[_Header], group: ProcessGroup | None, *, name: str, deadline_s: float
) -> list[ExactSums]:
    tables, lows = [], []
    for i, vector in enumerate(vectors):
        low = min(header.exponents[i][0] for header in headers)
        high = max(header.exponents[i][1] for header in headers)
        tables.append(tabulate(vector, low, high))
        lows.append(low)
    mine = torch.cat(tables)
    total = mine if group is None else sum_int64(mine, group, name=f"{name}: sums", deadline_s=deadline_s)
    parts = total.cpu().reshape(-1, NUM_COLUMNS).split([table.shape[0] for table in tables])
    return [read(part, low) for part, low in zip(parts, lows, strict=True)]


def _refuse(headers: Sequence[_Header], name: str) -> None:
    """Every rank has the same headers, hence raises the same error."""
    bad = {rank: header.bad for rank, header in enumerate(headers) if header.bad}
    if bad:
        raise NumericsError(
            "values are not finite",
            where=name,
            expected="finite values wherever the mask is set",
            got=", ".join(f"{count} of {count + headers[rank].num_finite} on rank {rank} of the group" for rank, count in bad.items()),
            fix="look for the first step with a non-finite loss or log-probability",
        )
    if not any(header.num_finite for header in headers):
        raise NumericsError(
            "the global batch has no token to learn from",
            where=name,
            expected="a masked token on some rank",
            got=f"none on any of {len(headers)} ranks",
            fix="check that responses are not empty and not all filtered away",
        )


def _moments_of_sequences(x_N: Tensor, sequence_N: Tensor) -> list[Tensor]:
    """[mean_i, var_i] of each sequence that has a value, from that sequence's values alone."""
    length_S = sequence_N.unique_consecutive(return_counts=True)[1]
    if length_S.numel() == 0:
        return [x_N, x_N]
    segment = {"lengths": length_S, "axis": 0, "unsafe": True}
    low_S, high_S = torch.segment_reduce(x_N, "min", **segment), torch.segment_reduce(x_N, "max", **segment)
    mean_S = torch.segment_reduce(x_N, "sum", **segment) / length_S
    # Clamping gives equal values exactly their own value as the mean, and moves no other mean but by its rounding error.
    mean_S = mean_S.clamp(low_S, high_S)
    deviation_N = x_N - mean_S.repeat_interleave(length_S)
    return [mean_S, torch.segment_reduce(deviation_N.square(), "sum", **segment) / length_S]


def _finish(n: int, sums: Sequence[ExactSums], low: float, high: float) -> Moments:
    across = sums[0]
    m2 = across.squares - across.total * across.total / n
    within = sums[1].total if len(sums) > 1 else Fraction(0)
    try:
        return Moments(n, float(across.total / n), float((m2 + within) / n), low, high)
    except OverflowError:
        got = f"values in [{low}, {high}]"
        raise NumericsError("the variance is beyond float64", where="moments", expected="values below 1e150", got=got) from None
