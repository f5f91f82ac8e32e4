"""The two collectives without processes: what several ranks would send is handed from one to the other as lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rpp.stats.local import collect
from megatron_rpp.stats.moments import Agreement, Population, agree, header_words
from megatron_rpp.stats.wire import Wire

EXACT = Wire()


@dataclass(frozen=True)
class Response:
    """One response: values, which of them count, and its domain."""

    values: tuple[float, ...]
    mask: tuple[bool, ...]
    domain: int = 0


def over_ranks(
    ranks: Sequence[Sequence[Response]],
    *,
    wire: Wire = EXACT,
    by_sequence: bool = False,
    num_domains: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Population, Agreement]:
    """What every rank would end up with, and what was agreed on the way."""
    locals_ = [_collected(rank, by_sequence, num_domains, dtype) for rank in ranks]
    agreement = agree([header_words(each, wire) for each in locals_], wire, name="split")
    return agreement.conclude([agreement.encode(each) for each in locals_]), agreement


def _collected(rank: Sequence[Response], by_sequence: bool, num_domains: int, dtype: torch.dtype) -> list:
    x_T = torch.tensor([value for one in rank for value in one.values], dtype=torch.float64).to(dtype)
    mask_T = torch.tensor([flag for one in rank for flag in one.mask], dtype=torch.bool)
    sequence_T = torch.tensor([number for number, one in enumerate(rank) for _ in one.values], dtype=torch.int64)
    domain_T = torch.tensor([one.domain for one in rank for _ in one.values], dtype=torch.int64) if num_domains > 1 else None
    return collect(x_T, mask_T, sequence_T if by_sequence else None, domain_T, num_domains=num_domains)
