"""Where the sequences lie in a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of(cu_len_S1: Tensor) -> Tensor:
    """The index of each token's sequence.

    Shapes: cu_len_S1 [S+1] int -> sequence_T [T] int64, ascending
    """
    lengths_S = cu_len_S1.to(torch.int64).diff()
    return torch.repeat_interleave(torch.arange(lengths_S.numel(), device=cu_len_S1.device), lengths_S)


def last_masked(mask_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """The position of the last masked token of each sequence, -1 where a sequence has none.

    It need not be the last token: a trajectory may end with a tool's answer.
    Shapes: mask_T [T] bool, sequence_T [T] int64 -> [S] int64
    """
    position_N = mask_T.nonzero().squeeze(1)
    none_S = torch.full((num_sequences,), -1, dtype=torch.int64, device=mask_T.device)
    return none_S.scatter_reduce(0, sequence_T[mask_T], position_N, reduce="amax")


def masked_lengths(mask_T: Tensor, cu_len_S1: Tensor) -> Tensor:
    """The number of masked tokens of each sequence: a response's length in tokens that the policy wrote.

    Shapes: mask_T [T] bool, cu_len_S1 [S+1] -> [S] int64
    """
    return sequence_of(cu_len_S1)[mask_T].bincount(minlength=cu_len_S1.numel() - 1)


def masked_sums(x_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor) -> Tensor:
    """The sum of each sequence's masked values, 0 for a sequence without one, added in the order of the tokens.

    A response has the same bits whatever it is packed with; index_add, whose order is not fixed on a GPU, would not do.
    Shapes: x_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> [S] float64
    """
    lengths_S = masked_lengths(mask_T, cu_len_S1)
    if lengths_S.numel() == 0:
        return x_T.new_zeros(0, dtype=torch.float64)
    return torch.segment_reduce(x_T[mask_T].double(), "sum", lengths=lengths_S, axis=0, unsafe=True)
