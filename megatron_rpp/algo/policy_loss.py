"""The clipped surrogate, per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import on_mask

# e^20 is beyond any ratio worth having and far below float32's largest number.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """What `ppo_clip` makes of each token. loss_T carries the gradient; the rest is detached. All 0 or False outside the mask.

    is_clipped_high_T: the ratio was above its bound and the advantage positive. is_clipped_low_T: below and negative.
    is_clipped_dual_T: above dual_clip and negative. Such tokens have no gradient.
    Shapes: [T] each
    """

    loss_T: Tensor
    ratio_T: Tensor
    is_clipped_low_T: Tensor
    is_clipped_high_T: Tensor
    is_clipped_dual_T: Tensor


def log_ratio(logp_new_T: Tensor, logp_old_T: Tensor, mask_T: Tensor) -> Tensor:
    """logp_new - logp_old on the mask, held to +-20; 0 elsewhere. In float32 or better.

    Shapes: [T], [T], [T] bool -> [T]
    """
    difference_T = at_least_float32(logp_new_T) - at_least_float32(logp_old_T)
    return on_mask(difference_T, mask_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo_clip(
    logp_new_T: Tensor,
    logp_old_T: Tensor,
    adv_T: Tensor,
    mask_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> ClippedLoss:
    """PPO's pessimistic surrogate with separate bounds, to be minimised.

    ratio = exp(logp_new - logp_old)
    loss  = -min(ratio * adv, clip(ratio, 1 - clip_low, 1 + clip_high) * adv)
    and, with dual_clip c > 1, for adv < 0:  loss = min(loss, -c * adv)
    d loss / d logp_new = -ratio * adv where no bound holds the token, else exactly 0; a ratio on its bound is not clipped.

    Written as -adv times the ratio after the one bound that can apply to it, which is the same function.

    Shapes: logp_new_T, logp_old_T, adv_T [T], mask_T [T] bool -> ClippedLoss of [T], in logp_new_T's dtype, float32 at least
    Source: PPO arXiv 1707.06347 Eq. 7; separate bounds DAPO arXiv 2503.14476 Eq. 10; dual clip arXiv 1912.09729 Eq. 5.
    """
    ratio_T = log_ratio(logp_new_T, logp_old_T, mask_T).exp()
    adv_T = on_mask(adv_T.detach(), mask_T).to(ratio_T.dtype)
    is_high_T = (adv_T > 0) & (ratio_T > 1 + clip_high)
    is_low_T = (adv_T < 0) & (ratio_T < 1 - clip_low)
    is_dual_T = torch.zeros_like(is_low_T) if dual_clip is None else (adv_T < 0) & (ratio_T > dual_clip)
    bounded_T = ratio_T.masked_fill(is_high_T, 1 + clip_high).masked_fill(is_low_T, 1 - clip_low)
    if dual_clip is not None:
        bounded_T = bounded_T.masked_fill(is_dual_T, dual_clip)
    return ClippedLoss(-adv_T * bounded_T, on_mask(ratio_T.detach(), mask_T), is_low_T, is_high_T, is_dual_T)


def at_least_float32(x_T: Tensor) -> Tensor:
    """A difference of two bfloat16 log-probabilities is noise."""
    return x_T if x_T.dtype == torch.float64 else x_T.float()
