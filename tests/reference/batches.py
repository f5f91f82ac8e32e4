"""Packed batches from rows, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_rpp.types import PackedBatch

Rows = Sequence[Sequence[float]]


def packed(
    masks: Rows,
    scores: Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    old: Rows | None = None,
    ref: Rows | None = None,
    dtype: torch.dtype = torch.float64,
    outside: float = math.nan,
) -> PackedBatch:
    """One sequence for each row of `masks`, with no prompt but what the mask leaves out.

    outside: what log-probabilities hold where the mask is 0; NaN, so that reading one shows.
    """
    mask_T = torch.tensor([bool(flag) for row in masks for flag in row], dtype=torch.bool)

    def flat(rows: Rows | None) -> Tensor | None:
        if rows is None:
            return None
        return torch.where(mask_T, torch.tensor([float(value) for row in rows for value in row], dtype=dtype), outside)

    lengths = [len(row) for row in masks]
    return PackedBatch(
        tokens_T=torch.arange(sum(lengths)),
        cu_len_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        mask_T=mask_T,
        logp_rollout_T=torch.full((sum(lengths),), outside, dtype=dtype),
        score_S=torch.tensor(list(scores), dtype=torch.float64),
        group_S=torch.tensor(list(groups) if groups is not None else list(range(len(lengths))), dtype=torch.int64),
        domain_S=torch.zeros(len(lengths), dtype=torch.int64),
        version_S=torch.zeros(len(lengths), dtype=torch.int64),
        is_truncated_S=torch.zeros(len(lengths), dtype=torch.bool),
        logp_old_T=flat(old),
        logp_ref_T=flat(ref),
    )


def rows_of(value_T: Tensor, batch: PackedBatch) -> list[list[float]]:
    """Packed values by sequence."""
    return [part.tolist() for part in value_T.tensor_split(batch.cu_len_S1[1:-1].long())]


def close(got: object, expected: object, *, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    """Asserts that two ragged lists of numbers agree."""
    if isinstance(expected, list | tuple):
        assert isinstance(got, list | tuple), (got, expected)
        assert len(got) == len(expected), (got, expected)
        for g, e in zip(got, expected, strict=True):
            close(g, e, rtol=rtol, atol=atol)
    else:
        assert abs(got - expected) <= atol + rtol * abs(expected), f"got {got!r}, expected {expected!r}"
