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
