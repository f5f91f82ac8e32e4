"""What the advantages of a step look like, from one short vector of each rank. Formulas only: the caller gathers the vectors.

A share is a float64 vector of NUM_SHARE numbers: sums over this rank's responses and two extremes. The caller gathers the shares of
all data-parallel ranks (not of context-parallel ones, which hold the same responses), in any order, and every rank calls
`summarise` on all of them. A sum travels as three numbers that add up to it exactly: the first is the sum rounded, the next what that
left out, and so on. Adding the numbers of all ranks exactly (math.fsum) then gives the correctly rounded sum over all responses, the
same bits for any split of the responses over ranks. Counts and squared lengths are integers below 2^53 and exact anyway.

Source: sums as Shewchuk, "Adaptive precision floating-point arithmetic" (1997); why these: OpenRLHF#856, where the mean over responses
of an advantage that is normalised over tokens is taken for an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algo.sequences import masked_lengths, masked_sums

_LIMBS = 3
_SUMS = ("responses", "tokens", "squared lengths", "advantages", "mean advantages", "squared mean advantages")
NUM_SHARE = len(_SUMS) * _LIMBS + 2


@dataclass(frozen=True, slots=True)
class CreditSummary:
    """The advantages of a step, over all ranks.

    token_mean: each masked token counts once; sample_mean: each response with one counts once, by the mean over its tokens.
    length_corr: Pearson's correlation, over responses, of their length and that mean; 0 where one of them does not vary.
    is_degenerate: every advantage is 0, so the step teaches nothing. min, max, abs_max: of single tokens; 0 without a token.
    """

    token_mean: float
    sample_mean: float
    length_corr: float
    min: float
    max: float
    abs_max: float
    is_degenerate: bool


def credit_share(adv_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor) -> Tensor:
    """This rank's share.

    Shapes: adv_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> [NUM_SHARE] float64 on adv_T's device
    """
    length_S, total_S = masked_lengths(mask_T, cu_len_S1), masked_sums(adv_T, mask_T, cu_len_S1)
    lengths = [length for length in length_S.tolist() if length]
    totals = total_S[length_S > 0].tolist()
    means = [total / length for total, length in zip(totals, lengths, strict=True)]
    sums = [[1.0] * len(lengths), lengths, [length * length for length in lengths], totals, means, [mean * mean for mean in means]]
    trained_N = adv_T[mask_T]
    extremes = [float(trained_N.max()), float((-trained_N).max())] if trained_N.numel() else [-math.inf, -math.inf]
    limbs = [limb for values in sums for limb in _exact_sum(values)]
    return torch.tensor([*limbs, *extremes], dtype=torch.float64, device=adv_T.device)


def summarise(shares: Sequence[Tensor]) -> CreditSummary:
    """The advantages of a step from every rank's share; of a step without a token all 0, and degenerate.

    With length l and mean advantage a of each of n responses
    length_corr = (n * sum l * a - sum l * sum a) / sqrt((n * sum l^2 - (sum l)^2) * (n * sum a^2 - (sum a)^2))
    Shapes: [ranks] tensors of [NUM_SHARE]
    Units: those of the advantages.
    """
    rows = [share.tolist() for share in shares]
    n, tokens, squares, total, means, mean_squares = (
        math.fsum(limb for row in rows for limb in row[_LIMBS * i : _LIMBS * (i + 1)]) for i in range(len(_SUMS))
    )
    if n == 0:
        return CreditSummary(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True)
    high, low = max(row[-2] for row in rows), -max(row[-1] for row in rows)
    spread = (n * squares - tokens * tokens) * _unless_rounding(n * mean_squares - means * means, n * mean_squares)
    return CreditSummary(
        token_mean=total / tokens,
        sample_mean=means / n,
        length_corr=(n * total - tokens * means) / math.sqrt(spread) if spread > 0 else 0.0,
        min=low,
        max=high,
        abs_max=max(abs(low), abs(high)),
        is_degenerate=low == high == 0,
    )


def _exact_sum(values: Sequence[float]) -> list[float]:
    """Numbers whose exact sum is that of the values, to 159 bits."""
    limbs: list[float] = []
    for _ in range(_LIMBS):
        limbs.append(math.fsum([*values, *(-limb for limb in limbs)]))
    return limbs


def _unless_rounding(difference: float, of: float) -> float:
    """0 for a difference of two nearly equal numbers that is no more than their rounding."""
    return difference if difference > 1e-12 * of else 0.0
