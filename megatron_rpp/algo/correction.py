"""The roll-out correction: weights and rejection where the engine and the trainer give a token different probabilities.

Tokens were sampled by `rollout`; the update is written for tokens of `old`. w = exp(logp_old - logp_rollout) is the
importance ratio of a token. The ratio of the policy loss stays new / old; a weight multiplies that loss, without gradient.

The correction has two parts, a weight and a rejection. Each looks at the ratio of its own level:
    token      w of the token
    sequence   product of w over the response: exact, with a variance that grows with the length
    geometric  its L-th root, exp(mean of log w): as narrow for 10 tokens as for 10000

The order of operations; steps 1 to 3 all look at the raw ratios:
    1. reject     a token is rejected where the ratio of `reject` lies outside [low, high] of `reject_outside`
    2. veto       a whole response is rejected where a token's w lies below `veto`
    3. weight     the ratio of `weight`, truncated to `weight_clip`; 1 where `weight` is none
    4. mode       a rejected token gets weight 0; with `reject_mode` mask it also leaves the loss mask and denominator
    5. normalize  with `weight_normalize` weights are divided by their mean over the tokens that are left on all ranks

TIS is a weight alone. MIS and rejection sampling are `reject` with mode mask, with the token's own weight or with none.
IcePop is `reject` by token with mode zero and the token's own weight: the kept fraction scales the gradient.

Source: TIS Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); IcePop Ling Team,
"Every step evolves" arXiv 2510.18855; sequence, geometric, MIS and veto Liu et al., "When speed kills stability" (2025),
and slime's and verl's code. verl writes bounds of rejection for rollout / old, the inverse of w; here they are for w.
verl and slime normalize over the mask before rejection; here the mean is over the tokens that the loss sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import on_mask
from megatron_rpp.algo.policy_loss import MAX_LOG_RATIO
from megatron_rpp.algo.sequences import masked_lengths, masked_sums, sequence_of
from megatron_rpp.config.schema import Correction, RatioLevel


@dataclass(frozen=True, slots=True)
class Corrected:
    """weight_T: what each token's policy loss is multiplied by, 0 outside mask_T. mask_T: what is left of the mask. No gradient.

    kept_T: the tokens that nothing rejects. mask_T is equal to it, or with reject_mode zero to the mask given.
    sums, to be added over ranks, for `summarise`: masked tokens, sum of weights, sum of their squares, tokens with a weight above
    0, tokens whose weight was held at a bound, responses with a masked token, responses vetoed. All by the mask given.
    Shapes: weight_T [T] float64, mask_T, kept_T [T] bool, sums [7] float64
    """

    weight_T: Tensor
    mask_T: Tensor
    kept_T: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True)
class CorrectionStats:
    """The same over all ranks, as numbers.

    weight_mean, ess_frac: mean and effective sample size of the weights before they are normalized, over the tokens of the
    original mask. kept_frac: tokens with a weight above 0. clipped_frac: tokens whose weight was truncated. vetoed_frac: of
    responses.
    """

    weight_mean: float
    ess_frac: float
    kept_frac: float
    clipped_frac: float
    vetoed_frac: float


def correction_weights(logp_old_T: Tensor, logp_rollout_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, correction: Correction) -> Corrected:
    """The weight of every token before normalization, and what is left of the mask, by the rules in the module's docstring.

    log w = logp_old - logp_rollout; each, and every sum of them, is held to +-20 before exp. Where one of the two is nan or
    infinite there is no ratio: a part of level token then rejects the token, the other levels and a veto reject the whole
    response. A weight without rejection and veto leaves the mask as it is. Without any part the weight is 1.

    Shapes: [T], [T], [T] bool, [S+1] -> Corrected of [T]
    """
    length_S = masked_lengths(mask_T, cu_len_S1)
    vetoed_S, is_held_T = torch.zeros_like(length_S, dtype=torch.bool), torch.zeros_like(mask_T)
    weight_T, is_kept_T = torch.ones_like(mask_T, dtype=torch.float64), mask_T
    if correction.is_on:
        raw_T = on_mask(logp_old_T.detach().double() - logp_rollout_T.detach().double(), mask_T)
        gaps = _Gaps(raw_T, mask_T, cu_len_S1, length_S)
        if correction.reject != "none":
            low, high = correction.reject_outside
            ratio_T, has_ratio_T = gaps.ratio(correction.reject)
            is_kept_T = has_ratio_T & (low <= ratio_T) & (ratio_T <= high)
        if correction.veto is not None:
            is_passed_T = mask_T & raw_T.isfinite() & (raw_T >= math.log(correction.veto))
            vetoed_S = masked_lengths(is_passed_T, cu_len_S1) < length_S
            is_kept_T = is_kept_T & ~vetoed_S[sequence_of(cu_len_S1)]
        if correction.weight != "none":
            ratio_T, has_ratio_T = gaps.ratio(correction.weight)
            is_kept_T = is_kept_T & has_ratio_T
            weight_T = ratio_T if correction.weight_clip is None else ratio_T.clamp(*correction.weight_clip)
            is_held_T = is_kept_T & (weight_T != ratio_T)
    weight_T = on_mask(weight_T, is_kept_T)
    is_rejecting = correction.reject != "none" or correction.veto is not None
    left_T = is_kept_T if is_rejecting and correction.reject_mode == "mask" else mask_T
    return Corrected(weight_T, left_T, is_kept_T, _sums(weight_T, mask_T, is_held_T, length_S, vetoed_S))


def normalized(weight_T: Tensor, mean: float) -> Tensor:
    """Weights divided by their mean over the kept tokens of all ranks, so that this mean becomes 1.

    out[t] = weight[t] / mean
    Shapes: weight_T [T] -> [T]
    Source: self-normalized importance sampling; verl's rollout_is_batch_normalize, slime's tis_batch_normalize.
    """
    return weight_T / mean


@dataclass(frozen=True, slots=True)
class _Gaps:
    """log w of a batch. raw_T: logp_old - logp_rollout, 0 outside the mask, not held."""

    raw_T: Tensor
    mask_T: Tensor
    cu_len_S1: Tensor
    length_S: Tensor

    def ratio(self, level: RatioLevel) -> tuple[Tensor, Tensor]:
        """The ratio of a level, on every token, and the masked tokens that have one.

        Shapes: -> [T] float64, [T] bool
        """
        is_number_T = self.raw_T.isfinite()
        log_w_T = torch.where(is_number_T, self.raw_T, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        has_ratio_T = self.mask_T & is_number_T
        if level == "token":
            return log_w_T.exp(), has_ratio_T
        sequence_T = sequence_of(self.cu_len_S1)
        log_S = masked_sums(log_w_T, self.mask_T, self.cu_len_S1)
        log_S = log_S if level == "sequence" else log_S / self.length_S.clamp(min=1)
        is_whole_S = masked_lengths(has_ratio_T, self.cu_len_S1) == self.length_S
        return log_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[sequence_T], self.mask_T & is_whole_S[sequence_T]


def summarise(sums: Tensor) -> CorrectionStats:
    """The statistic from sums over all ranks; mean, ess_frac and kept_frac are 1 when there was no token, ess_frac 0 when none is left.

    ess_frac = (sum w)^2 / (tokens * sum w^2)
    Shapes: sums [7] float64
    """
    num_tokens, total_w, total_w2, kept, held, responses, vetoed = sums.tolist()
    if num_tokens == 0:
        return CorrectionStats(1.0, 1.0, 1.0, 0.0, 0.0)
    return CorrectionStats(
        weight_mean=total_w / num_tokens,
        ess_frac=total_w * total_w / (num_tokens * total_w2) if total_w2 > 0 else 0.0,
        kept_frac=kept / num_tokens,
        clipped_frac=held / num_tokens,
        vetoed_frac=vetoed / responses,
    )


def _sums(weight_T: Tensor, mask_T: Tensor, is_held_T: Tensor, length_S: Tensor, vetoed_S: Tensor) -> Tensor:
    counts = [(weight_T > 0).sum(), is_held_T.sum(), (length_S > 0).sum(), vetoed_S.sum()]
    return torch.stack([mask_T.sum().double(), weight_T.sum(), weight_T.square().sum(), *(count.double() for count in counts)])
