"""Mean and variance over the tokens of all ranks, and the normalisation made of them.

Two collectives, each an all_gather of at most 64 bytes a statistic (a domain) and rank, entered by every rank:
    1. a header: counts, smallest and largest value (wire.py)
    2. with the scale that follows from the headers, the sums: on the wire fp64 two integers of fixed length (exact.py)

On fp64 the mean and the variance are those of the exact rational result, rounded once, and hence the same bits for every number
of ranks, every split of the sequences over ranks, every order of rows, on any device: the integers that each rank sends are sums
of functions of one value (of one sequence, in the sample population) and of `top`; `top` is a maximum over all values; sums of
integers and maxima know no order. The other wires give equal bits on all ranks, but not for all splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S, all_gather, sum_int64
from megatron_rpp.dist.groups import ProcessGroup
from megatron_rpp.errors import NumericsError
from megatron_rpp.stats.local import Local, collect
from megatron_rpp.stats.wire import HEADER_WORDS, VARIANCE_FLOOR, Agreed, Header, Wire, WireName, pooled


@dataclass(frozen=True, slots=True)
class Moments:
    """n values, their mean, their population variance, and their range.

    With the sample population n counts responses, mean and variance weigh every response 1 and its tokens equally within
    it; min and max are of single tokens all the same. mean_tail: what rounding the exact mean to float64 left out, itself rounded.
    Values that lie close together far from 0 need it: in the units of their deviation, half a step of the mean can be large.
    """

    n: int
    mean: float
    variance: float
    min: float = -math.inf
    max: float = math.inf
    mean_tail: float = 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    @property
    def scale(self) -> float:
        """What whitening multiplies by: 1 / sqrt(max(variance, 1e-8))."""
        return 1.0 / math.sqrt(max(self.variance, VARIANCE_FLOOR))


@dataclass(frozen=True, slots=True)
class Population(Moments):
    """The moments of everything that was measured, and how they came to be known.

    domains: those of each domain by number, None where no rank has a value of it; of scope global a single entry.
    limbs: of wire fp8, the number in use. wire_bytes: what this rank sent in the two collectives. bound: (stretch, shift), what the
    wire does to a whitened value at most, |adv' - adv| <= stretch * |adv| + shift; of the worst domain; float64's rounding is apart.
    """

    domains: tuple[Moments | None, ...] = ()
    limbs: int | None = None
    wire_bytes: int = 0
    bound: tuple[float, float] = (0.0, 0.0)


def distributed_moments(
    x_T: Tensor,
    mask_T: Tensor,
    group: ProcessGroup | None,
    *,
    sequence_T: Tensor | None = None,
    domain_T: Tensor | None = None,
    num_domains: int = 1,
    wire: Wire = Wire(),  # noqa: B008  frozen
    native_float8: bool = False,
    name: str = "moments",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Population:
    """The moments of the masked values of all ranks of a group; equal bits on each. Two collectives, entered by every rank.

    sequence_T None: the token population, each masked value counts once.
        mean = sum x / n;  variance = sum (x - mean)^2 / n
    sequence_T given: the sample population, each sequence with a masked token counts once, whatever its length L_i:
        mean = sum_i sum_t x[t] / (L_i * n);  variance = sum_i sum_t (x[t] - mean)^2 / (L_i * n)
    The tokens of a sequence may lie on several ranks in the first (in the pieces of context parallelism, say), where tokens are all
    that counts. In the second a sequence must be whole on one rank: its pieces would each count once, and nothing tells them apart.

    domain_T given: these moments for each domain by itself. num_domains must be the same on every rank.
    group None: this process alone, no collective (not torch's None, which would be everybody).
    native_float8: wire fp8 goes as the type float8_e4m3fn and not as bytes; see dist.float8.
    Shapes: x_T [T] any float dtype, mask_T [T] bool, sequence_T [T] int64 ascending, domain_T [T] int64 in [0, num_domains)
    Raises: NumericsError on every rank alike when no rank has a masked value, or when one is not finite, or the variance is
    beyond float64; DeadlineError when a peer does not come.
    """
    locals_ = collect(x_T, mask_T, sequence_T, domain_T, num_domains=num_domains)

    def gather(mine: Tensor, what: str) -> list[Tensor]:
        return [mine] if group is None else all_gather(mine, group, name=f"{name}: {what}", deadline_s=deadline_s)

    agreement = agree(gather(header_words(locals_, wire), "sizes"), wire, name=name)
    mine = agreement.encode(locals_)
    is_typed = native_float8 and agreement.wire.name == "fp8"
    parts = gather(mine.view(torch.float8_e4m3fn) if is_typed else mine, "sums")
    return agreement.conclude([part.view(mine.dtype) for part in parts])


def distributed_mean(
    x_T: Tensor,
    mask_T: Tensor,
    group: ProcessGroup | None,
    *,
    empty: float,
    name: str = "mean",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> float:
    """The mean of the masked values of all ranks, the same bits however they are split; `empty` where no rank has one.

    Entered by every rank. group None: this process alone, no collective.
    Shapes: x_T [T] any float dtype, mask_T [T] bool
    Raises: NumericsError on every rank alike when a masked value is not finite; DeadlineError when a peer does not come.
    """
    count = mask_T.sum()
    if group is not None:
        count = sum_int64(count, group, name=f"{name}: count", deadline_s=deadline_s)
    return distributed_moments(x_T, mask_T, group, name=name, deadline_s=deadline_s).mean if count.item() else empty


def header_words(locals_: Sequence[Local], wire: Wire) -> Tensor:
    """What this rank sends first: [D, 6] int64."""
    return torch.tensor([Header.of(local, wire).words() for local in locals_], dtype=torch.int64).reshape(-1, HEADER_WORDS)


def agree(parts: Sequence[Tensor], wire: Wire, *, name: str) -> Agreement:
    """What follows from the headers of all ranks, in rank order; the same on each, and so is the error that they may give.

    Shapes: parts, one [D, 6] int64 of each rank
    Raises: NumericsError when no rank has a value, or when one is not finite.
    """
    headers = [[Header.from_words(row) for row in part.tolist()] for part in parts]
    _refuse(headers, name)
    domains = {number: Agreed(each) for number, each in enumerate(zip(*headers, strict=True)) if any(header.units for header in each)}
    return Agreement(domains, len(headers[0]), wire.settled(tuple(domains.values())))


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know after the first collective: of every domain with a value, and the wire with its number of limbs."""

    domains: dict[int, Agreed]
    num_domains: int
    wire: Wire

    def encode(self, locals_: Sequence[Local]) -> Tensor:
        """What this rank sends second; see Wire.encode."""
        return self.wire.encode([locals_[number] for number in self.domains], tuple(self.domains.values()))

    def conclude(self, parts: Sequence[Tensor]) -> Population:
        """The moments, from what all ranks sent second, in rank order."""
        agreed = tuple(self.domains.values())
        found = self.wire.decode(parts, agreed)
        one_by_one = {number: _moments(one, *spread) for (number, one), spread in zip(self.domains.items(), found, strict=True)}
        # Everything together is the pool of the domains, in rational arithmetic: as exact as they are.
        everything = Agreed(tuple(header for one in agreed for header in one.headers))
        whole = _moments(everything, *pooled([(one.n, *spread) for one, spread in zip(agreed, found, strict=True)]))
        return Population(
            **asdict(whole),
            domains=tuple(one_by_one.get(number) for number in range(self.num_domains)),
            limbs=self.wire.limbs,
            wire_bytes=8 * HEADER_WORDS * self.num_domains + parts[0].nbytes,
            bound=max((one.bound(self.wire.rho) for one in agreed), key=sum),
        )


def whiten(
    x_T: Tensor,
    mask_T: Tensor,
    *,
    sequence_T: Tensor,
    domain_S: Tensor | None = None,
    group: ProcessGroup | None,
    population: Literal["token", "sample"] = "token",
    scope: Literal["global", "domain"] = "global",
    num_domains: int | None = None,
    recentre: bool = True,
    rescale: bool = True,
    wire: WireName = "fp64",
    limbs: int | None = None,
    native_float8: bool = False,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> tuple[Tensor, Population]:
    """Masked values brought to mean 0 and variance 1 over all ranks; exactly 0 elsewhere.

    out[t] = (x[t] - mean) / sqrt(max(variance, 1e-8)) where mask[t], else 0; without recentre (x[t] / sqrt(...)), the variance
    still being that about the mean; without rescale x[t], and the statistics are only measured.
    population: token counts every masked value once, sample every sequence once, which must then be whole on one rank.
    scope: over everything, or over the sequences of each domain by themselves. A domain without a value is skipped. The
    population that is returned is the global one either way. num_domains: the same on every rank; needed with a group.
    wire, limbs: how the sums travel, see wire.py.
    group: ranks that hold different sequences. Should it hold some of them twice, on each of several context-parallel ranks,
    only the reported n grows: mean and variance of exact multiples are the same bits.

    Shapes: x_T [T], mask_T [T] bool, sequence_T [T] int64, domain_S [S] int64 -> [T] float64
    Units: deadline_s in seconds, for each of the two collectives.
    Raises: NumericsError on every rank alike when no rank has a masked value, or when one is not finite; DeadlineError when a
    peer does not come; ValueError for a scope of domains without their number, or a number of limbs that cannot be.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 5. Population variance and floor as OpenRLHF; verl, slime use n - 1 and var + 1e-8.
    Without recentre it scales the raw values; the peers' shift_mean=False adds the mean back after scaling (slime#1369).
    """
    domain_T, num_domains = _domains(sequence_T, domain_S, scope, num_domains, is_alone=group is None)
    seen = distributed_moments(
        x_T,
        mask_T,
        group,
        sequence_T={"token": None, "sample": sequence_T}[population],
        domain_T=domain_T,
        num_domains=num_domains,
        wire=Wire(wire, limbs),
        native_float8=native_float8,
        name="normalise advantages",
        deadline_s=deadline_s,
    )
    out_T = x_T.detach().double()
    if rescale:
        constants = [(one.mean, one.mean_tail, one.scale) if one else (0.0, 0.0, 0.0) for one in seen.domains]
        constant_D3 = torch.tensor(constants, dtype=torch.float64, device=x_T.device)
        mean_T, tail_T, scale_T = constant_D3[0] if domain_T is None else constant_D3[domain_T].unbind(1)
        out_T = ((out_T - mean_T) - tail_T) * scale_T if recentre else out_T * scale_T
    # Not a multiplication by the mask: NaN * 0 is NaN.
    return torch.where(mask_T, out_T, torch.zeros_like(out_T)), seen


def _domains(
    sequence_T: Tensor, domain_S: Tensor | None, scope: str, num_domains: int | None, *, is_alone: bool
) -> tuple[Tensor | None, int]:
    """The domain of each token, None where there is but one statistic, and how many statistics there are."""
    if scope == "global":
        return None, 1
    if domain_S is None or (num_domains is None and not is_alone):
        raise ValueError("scope 'domain' needs domain_S and, over a group, num_domains: a rank need not have them all")
    if num_domains is None:
        num_domains = int(domain_S.max()) + 1 if domain_S.numel() else 1
    return domain_S.long()[sequence_T], num_domains


def _refuse(headers: Sequence[Sequence[Header]], name: str) -> None:
    """Every rank has the same headers, hence raises the same error."""
    bad = {rank: sum(header.num_bad for header in row) for rank, row in enumerate(headers)}
    finite = [sum(header.num_finite for header in row) for row in headers]
    if any(bad.values()):
        raise NumericsError(
            "values are not finite",
            where=name,
            expected="finite values wherever the mask is set",
            got=", ".join(f"{count} of {count + finite[rank]} on rank {rank} of the group" for rank, count in bad.items() if count),
            fix="look for the first step with a non-finite loss or log-probability",
        )
    if not any(finite):
        raise NumericsError(
            "the global batch has no token to learn from",
            where=name,
            expected="a masked token on some rank",
            got=f"none on any of {len(headers)} ranks",
            fix="check that responses are not empty and not all filtered away",
        )


def _moments(agreed: Agreed, mean: Fraction, variance: Fraction) -> Moments:
    try:
        tail = float(mean - Fraction(float(mean)))
        return Moments(agreed.n, float(mean), float(variance), min=agreed.low, max=agreed.high, mean_tail=tail)
    except OverflowError:
        got = f"values in [{agreed.low}, {agreed.high}]"
        raise NumericsError("the variance is beyond float64", where="moments", expected="values below 1e150", got=got) from None
