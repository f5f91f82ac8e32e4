"""From per-token losses to one number. Masked by selection: what is stored outside the mask is never read.

The training loss takes `masked_sum` alone; Megatron divides it by the token count of the whole optimiser step over all ranks
(calculate_per_token_loss), which is `token_mean`. The others are the conventions of other papers, over whole sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algo.sequences import sequence_of


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


def token_mean(loss_T: Tensor, mask_T: Tensor, *, num_tokens: float | None = None) -> Tensor:
    """sum of loss over the mask / num_tokens.

    num_tokens: None counts the mask given. When the loss is one microbatch's or one rank's, the count of the whole optimiser
    step, or where ranks' gradients are averaged that count / dp_size: a mean of means weighs short parts too much.
    Shapes: loss_T [T], mask_T [T] bool -> []
    """
    return masked_sum(loss_T, mask_T) / (_at_least_one(mask_T.sum()) if num_tokens is None else num_tokens)


def seq_mean_token_mean(loss_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor) -> Tensor:
    """Mean over sequences of each one's mean over its masked tokens; sequences with none are not counted.

    Shapes: loss_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> []
    Source: REINFORCE++ arXiv 2501.03262 Eq. 1, GRPO.
    """
    sum_S, length_S = _by_sequence(loss_T, mask_T, cu_len_S1)
    return (sum_S / _at_least_one(length_S)).sum() / _at_least_one((length_S > 0).sum())


def seq_mean_token_sum(loss_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor) -> Tensor:
    """Mean over sequences of each one's sum over its masked tokens; sequences with none are not counted.

    Shapes: loss_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> []
    Source: RLOO arXiv 2402.14740.
    """
    sum_S, length_S = _by_sequence(loss_T, mask_T, cu_len_S1)
    return sum_S.sum() / _at_least_one((length_S > 0).sum())


def constant_length(loss_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, length: int) -> Tensor:
    """sum of loss over the mask / (number of sequences * length), the same weight for a token of any response.

    length: the generation budget. All sequences count, empty ones too.
    Shapes: loss_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> []
    Source: Dr. GRPO arXiv 2503.20783.
    """
    return masked_sum(loss_T, mask_T) / (max(1, cu_len_S1.numel() - 1) * length)


def _by_sequence(x_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor) -> tuple[Tensor, Tensor]:
    sequence_N, num_sequences = sequence_of(cu_len_S1)[mask_T], cu_len_S1.numel() - 1
    sum_S = x_T.new_zeros(num_sequences).index_add(0, sequence_N, x_T[mask_T])
    return sum_S, sequence_N.bincount(minlength=num_sequences)


def _at_least_one(count: Tensor) -> Tensor:
    return count.clamp(min=1)
