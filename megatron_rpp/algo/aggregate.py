"""From per-token losses to one number, as a sum and a denominator that add up over microbatches and ranks.

    loss of an optimiser step = sum over all tokens of share[t] * loss[t]  /  sum of denominators

with one row of this table for each `algo.aggregate`; L is the number of masked tokens of the token's response:

    token_mean             share 1                      denominator: masked tokens
    seq_mean_token_mean    share 1 / L                  denominator: responses with a masked token
    seq_mean_token_sum     share 1                      denominator: responses with a masked token
    constant_length        share 1 / aggregate_tokens   denominator: responses, those without a masked token too

Numerator and denominator look at one mask. They are divided once, by Megatron, after both were summed over the whole optimiser
step and all data-parallel ranks (calculate_per_token_loss): a mean of means would weigh short microbatches too much.
The share of a token depends on its own response alone, so a response must be whole in one microbatch.

Masked by selection: what is stored outside the mask is never read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rpp.algo.sequences import masked_lengths, sequence_of
from megatron_rpp.config.schema import AggregateName

# (mask_T, cu_len_S1, aggregate_tokens) -> (share_T float64, denominator [] int64)
Aggregate = Callable[[Tensor, Tensor, int | None], tuple[Tensor, Tensor]]


def on_mask(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """x[t] on the mask, 0 elsewhere; NaN stored elsewhere reaches neither the value nor, if this comes first, the gradient.

    Shapes: x_T [T], mask_T [T] bool -> [T]
    """
    return torch.where(mask_T, x_T, torch.zeros_like(x_T))


def masked_sum(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """sum_t x[t] over the mask; a 0 that still hangs in the graph when the mask is empty.

    Shapes: x_T [T], mask_T [T] bool -> []
    """
    return on_mask(x_T, mask_T).sum()


def token_mean(mask_T: Tensor, cu_len_S1: Tensor, num_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Every token counts the same.

    Shapes: mask_T [T] bool, cu_len_S1 [S+1] -> share_T [T] float64, denominator [] int64
    Source: DAPO arXiv 2503.14476 Eq. 12; the default of OpenRLHF, verl, NeMo-RL and AReaL.
    """
    return mask_T.double(), mask_T.sum()


def seq_mean_token_mean(mask_T: Tensor, cu_len_S1: Tensor, num_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Every response with a masked token counts the same, and so does every token in it.

    Shapes: mask_T [T] bool, cu_len_S1 [S+1] -> share_T [T] float64, denominator [] int64
    Source: GRPO arXiv 2402.03300 Eq. 3, REINFORCE++ arXiv 2501.03262 Eq. 1. As ROLL.
    """
    length_S = masked_lengths(mask_T, cu_len_S1)
    return mask_T / length_S.clamp(min=1).double()[sequence_of(cu_len_S1)], (length_S > 0).sum()


def seq_mean_token_sum(mask_T: Tensor, cu_len_S1: Tensor, num_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """The mean over responses with a masked token of the sum over their tokens.

    Shapes: mask_T [T] bool, cu_len_S1 [S+1] -> share_T [T] float64, denominator [] int64
    Source: RLOO arXiv 2402.14740, where the whole response is one action.
    """
    return mask_T.double(), (masked_lengths(mask_T, cu_len_S1) > 0).sum()


def constant_length(mask_T: Tensor, cu_len_S1: Tensor, num_tokens: int | None) -> tuple[Tensor, Tensor]:
    """sum / (responses * num_tokens): the same weight for a token of any response, short or long.

    num_tokens: the generation budget. verl divides by the padded width of the batch at hand, and not by the responses.
    Shapes: mask_T [T] bool, cu_len_S1 [S+1] -> share_T [T] float64, denominator [] int64
    Raises: ValueError without num_tokens.
    Source: Dr. GRPO arXiv 2503.20783 section 3.
    """
    if num_tokens is None:
        raise ValueError("aggregate constant_length needs algo.aggregate_tokens, the length that every response is divided by")
    return mask_T.double() / num_tokens, torch.tensor(cu_len_S1.numel() - 1, device=mask_T.device)


AGGREGATES: dict[AggregateName, Aggregate] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "constant_length": constant_length,
}


def aggregate(
    loss_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, name: AggregateName, num_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """This part's summand of the numerator, and of the denominator.

    sum_t share[t] * loss[t] over the mask;  a 0 that still hangs in the graph when the mask is empty
    Shapes: loss_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> loss [] in loss_T's dtype, denominator [] int64
    Raises: ValueError as `constant_length`.
    """
    share_T, denominator = AGGREGATES[name](mask_T, cu_len_S1, num_tokens)
    return (share_T.to(loss_T.dtype) * on_mask(loss_T, mask_T)).sum(), denominator
