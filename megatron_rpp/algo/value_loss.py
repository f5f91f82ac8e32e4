"""What the critic minimises, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import on_mask


def value_loss(value_new_T: Tensor, value_old_T: Tensor, return_T: Tensor, mask_T: Tensor, *, clip: float | None) -> Tensor:
    """Half the squared distance to the return, and no reward for moving a value farther than `clip` in one step.

    held = clip(value_new, value_old - clip, value_old + clip)
    loss = max((value_new - return)^2, (held - return)^2) / 2;  without clip (value_new - return)^2 / 2
    The gradient is value_new - return where the first term is the larger or they are equal; 0 where the second is: the value
    has moved past its bound, towards its return. What is stored outside the mask is never read.

    Shapes: [T] each, mask_T bool -> [T] in value_new_T's dtype, float32 at least; 0 outside the mask
    Source: Schulman et al., openai/baselines ppo2; arXiv 1707.06347 Eq. 9 is the term without clip. As OpenRLHF and verl.
    """
    dtype = torch.promote_types(value_new_T.dtype, torch.float32)
    new_T, old_T, return_T = (on_mask(x_T, mask_T).to(dtype) for x_T in (value_new_T, value_old_T.detach(), return_T.detach()))
    square_T = (new_T - return_T).square()
    if clip is not None:
        held_T = old_T + (new_T - old_T).clamp(-clip, clip)
        held_square_T = (held_T - return_T).square()
        # torch.maximum would share the gradient between equal terms; inside the bound both are the same number.
        square_T = torch.where(held_square_T > square_T, held_square_T, square_T)
    return 0.5 * square_T
