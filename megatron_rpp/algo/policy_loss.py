"""The policy loss of each token, one function for each name of `algo.loss`. All to be minimised; A is the advantage.

    ppo_clip    -min(ratio * A, clip(ratio) * A)       the token's own ratio; beyond its bound a token has no gradient
    gspo        the same with one ratio for a response, the geometric mean over its tokens
    cispo       -held(clip(ratio)) * A * logp          the bound limits a token's weight; every token keeps a gradient
    reinforce   -A * logp                              no ratio; exact for tokens of the new policy only

`policy_loss` looks the name up and multiplies by the roll-out correction, `batch.weight_T`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import on_mask
from megatron_rpp.algo.sequences import masked_lengths, masked_sums, sequence_of
from megatron_rpp.config.schema import Algo, LossName
from megatron_rpp.types import PackedBatch

# e^20 is beyond any ratio worth having and far below float32's largest number.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What a loss makes of each token. loss_T carries the gradient; the rest is detached. All 0 or False outside the mask.

    ratio_T: what was compared with the bounds: the token's ratio, or in gspo its response's.
    is_clipped_high_T, is_clipped_low_T: a bound was in force. In ppo_clip and gspo above for a positive advantage, or below for a
    negative one, and such tokens have no gradient; in cispo for either sign, and they keep one.
    is_clipped_dual_T: above dual_clip and negative; no gradient.
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
) -> TokenLoss:
    """PPO's pessimistic surrogate with separate bounds.

    ratio = exp(logp_new - logp_old)
    loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
    and, with dual_clip c > 1, for A < 0:  loss = min(loss, -c * A)
    d loss / d logp_new = -ratio * A where no bound holds the token, else exactly 0; a ratio on its bound is not clipped.

    Shapes: logp_new_T, logp_old_T, adv_T [T], mask_T [T] bool -> TokenLoss of [T], in logp_new_T's dtype, float32 at least
    Source: PPO arXiv 1707.06347 Eq. 7; separate bounds DAPO arXiv 2503.14476 Eq. 10; dual clip arXiv 1912.09729 Eq. 5.
    """
    ratio_T = log_ratio(logp_new_T, logp_old_T, mask_T).exp()
    return _clipped(ratio_T, adv_T, mask_T, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def gspo(
    logp_new_T: Tensor, logp_old_T: Tensor, adv_T: Tensor, mask_T: Tensor, *, cu_len_S1: Tensor, clip_low: float, clip_high: float
) -> TokenLoss:
    """PPO's surrogate with the ratio of the whole response, in the token form of the paper.

    s     = exp(mean over the response's masked tokens of (logp_new - logp_old)), each difference held to +-20
    s_t   = held(s) * exp(logp_new[t] - held(logp_new[t]))       the value of s, the gradient of token t alone
    loss  = -min(s_t * A, clip(s_t, 1 - clip_low, 1 + clip_high) * A)
    d loss / d logp_new = -s * A where no bound holds the token, else exactly 0

    Where A is one number for a response, that is the value and the gradient of the sequence form -min(s A, clip(s) A) shared
    out over its tokens: under seq_mean_token_mean each token's gradient is -A s / L. Where A differs between tokens (a
    discount, KL in the reward), each token keeps its own. s moves by about 1 / L of what a token moves by, so its bounds are
    some 1000 times narrower than ppo_clip's: with 0.2 nothing is ever clipped. No dual clip, which is about single tokens
    (verl accepts one here and ignores it).

    A response must be whole; context parallelism, which cuts it inside the model, ends before the loss (mcore/forward.py).

    Shapes: logp_new_T, logp_old_T, adv_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> TokenLoss of [T]
    Source: GSPO arXiv 2507.18071 Eq. 5 and 7, token form Eq. 13 and 14; bounds 3e-4 and 4e-4 in its section 5.1.
    """
    own_T = log_ratio(logp_new_T, logp_old_T, mask_T)
    # In float64 and in the order of the tokens, so that packing does not decide which side of a bound a response is on.
    log_s_S = masked_sums(own_T.detach(), mask_T, cu_len_S1) / masked_lengths(mask_T, cu_len_S1).clamp(min=1)
    log_s_T = log_s_S[sequence_of(cu_len_S1)].to(own_T.dtype)
    s_T = (log_s_T + (own_T - own_T.detach())).exp()
    return _clipped(s_T, adv_T, mask_T, clip_low=clip_low, clip_high=clip_high, dual_clip=None)


def cispo(logp_new_T: Tensor, logp_old_T: Tensor, adv_T: Tensor, mask_T: Tensor, *, clip_low: float, clip_high: float) -> TokenLoss:
    """REINFORCE with a clipped importance weight, held fixed.

    loss = -held(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logp_new
    d loss / d logp_new = -clip(ratio) * A: never 0 for A != 0, however far the ratio went

    clip_low >= 1 leaves the weight free below, which is the paper's setting; its upper bound is not printed (verl's example:
    clip_high 10). No dual clip: it would take the gradient away that this loss is about (NeMo-RL refuses it too).

    Shapes: logp_new_T, logp_old_T, adv_T [T], mask_T [T] bool -> TokenLoss of [T]
    Source: MiniMax-M1 arXiv 2506.13585 Eq. 4 and 5.
    """
    ratio_T = log_ratio(logp_new_T, logp_old_T, mask_T).detach().exp()
    is_low_T, is_high_T = mask_T & (ratio_T < 1 - clip_low), mask_T & (ratio_T > 1 + clip_high)
    weight_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -weight_T * _advantage(adv_T, mask_T, weight_T) * on_mask(at_least_float32(logp_new_T), mask_T)
    return TokenLoss(loss_T, on_mask(ratio_T, mask_T), is_low_T, is_high_T, torch.zeros_like(mask_T))


def reinforce(logp_new_T: Tensor, logp_old_T: Tensor, adv_T: Tensor, mask_T: Tensor) -> TokenLoss:
    """The policy gradient itself.

    loss = -A * logp_new;  d loss / d logp_new = -A
    Right while new is what sampled the tokens, so with algo.minibatches 1. The ratio is measured and not used.

    Shapes: logp_new_T, logp_old_T, adv_T [T], mask_T [T] bool -> TokenLoss of [T]
    Source: Williams 1992; for language models RLOO arXiv 2402.14740 and ReMax arXiv 2310.10505.
    """
    ratio_T = log_ratio(logp_new_T, logp_old_T, mask_T).detach().exp()
    new_T = on_mask(at_least_float32(logp_new_T), mask_T)
    nowhere_T = torch.zeros_like(mask_T)
    return TokenLoss(-_advantage(adv_T, mask_T, new_T) * new_T, on_mask(ratio_T, mask_T), nowhere_T, nowhere_T, nowhere_T)


def _clipped(ratio_T: Tensor, adv_T: Tensor, mask_T: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None) -> TokenLoss:
    """-A times the ratio after the one bound that can apply to it, which is the min of the two products."""
    adv_T = _advantage(adv_T, mask_T, ratio_T)
    is_high_T = (adv_T > 0) & (ratio_T > 1 + clip_high)
    is_low_T = (adv_T < 0) & (ratio_T < 1 - clip_low)
    is_dual_T = torch.zeros_like(is_low_T) if dual_clip is None else (adv_T < 0) & (ratio_T > dual_clip)
    bounded_T = ratio_T.masked_fill(is_high_T, 1 + clip_high).masked_fill(is_low_T, 1 - clip_low)
    if dual_clip is not None:
        bounded_T = bounded_T.masked_fill(is_dual_T, dual_clip)
    return TokenLoss(-adv_T * bounded_T, on_mask(ratio_T.detach(), mask_T), is_low_T, is_high_T, is_dual_T)


def _advantage(adv_T: Tensor, mask_T: Tensor, like_T: Tensor) -> Tensor:
    return on_mask(adv_T.detach(), mask_T).to(like_T.dtype)


def at_least_float32(x_T: Tensor) -> Tensor:
    """A difference of two bfloat16 log-probabilities is noise."""
    return x_T if x_T.dtype == torch.float64 else x_T.float()


Loss = Callable[[Tensor, PackedBatch, Tensor, Algo], TokenLoss]

# (logp_new_T, batch with logp_old_T, adv_T, algo) -> TokenLoss
LOSSES: dict[LossName, Loss] = {
    "ppo_clip": lambda new_T, batch, adv_T, algo: ppo_clip(
        new_T, batch.logp_old_T, adv_T, batch.mask_T, clip_low=algo.clip_low, clip_high=algo.clip_high, dual_clip=algo.dual_clip
    ),
    "gspo": lambda new_T, batch, adv_T, algo: gspo(
        new_T, batch.logp_old_T, adv_T, batch.mask_T, cu_len_S1=batch.cu_len_S1, clip_low=algo.clip_low, clip_high=algo.clip_high
    ),
    "cispo": lambda new_T, batch, adv_T, algo: cispo(
        new_T, batch.logp_old_T, adv_T, batch.mask_T, clip_low=algo.clip_low, clip_high=algo.clip_high
    ),
    "reinforce": lambda new_T, batch, adv_T, algo: reinforce(new_T, batch.logp_old_T, adv_T, batch.mask_T),
}


def policy_loss(logp_new_T: Tensor, batch: PackedBatch, adv_T: Tensor, algo: Algo) -> TokenLoss:
    """The loss that `algo` names, times batch.weight_T where there is one.

    Shapes: logp_new_T, adv_T [T] as batch's tensors -> TokenLoss of [T]
    Raises: ValueError for a dual clip with a loss that has none.
    """
    if algo.dual_clip is not None and algo.loss != "ppo_clip":
        raise ValueError(f"dual_clip bounds the token ratio of ppo_clip; loss {algo.loss} has no such bound")
    found = LOSSES[algo.loss](logp_new_T, batch, adv_T, algo)
    if batch.weight_T is None:
        return found
    return replace(found, loss_T=found.loss_T * _advantage(batch.weight_T, batch.mask_T, found.loss_T))
