"""Weights for what the roll-out engine computed otherwise than the trainer, from the same weights and for the same tokens.

Tokens were sampled by `rollout`; the update is written for tokens of `old`. w = exp(logp_old - logp_rollout) is what each token
counts too little or too much. The ratio of the policy loss stays new / old, and w multiplies it from outside, held fixed.

`level` says what is judged:  token      w of the token
                              sequence   product of w over the response: exact for a response, and wild for a long one
                              geometric  its L-th root, exp(mean of log w): as narrow for 10 tokens as for 10000
`kind` what follows from it:  tis        the weight is the judged number held to [low, high]; the mask stays
                              icepop     the token's own w where low <= judged <= high, else 0; the mask stays
                              mis        as icepop, and what is outside leaves the mask, hence the loss's denominator too
`veto`: a response with a token below it is left out whole, in the way of its kind: weight 0 in tis and icepop, out of the mask
in mis. Only mis changes what the loss is divided by: the kept fraction scales the gradient of the other two.

Source: TIS Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); IcePop Ling Team,
"Every step evolves" arXiv 2510.18855; sequence, geometric, MIS and veto Liu et al., "When speed kills stability" (2025), and
slime's and verl's code. verl writes bounds of rejection for rollout / old, the inverse of w; here they are for w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import on_mask
from megatron_rpp.algo.policy_loss import MAX_LOG_RATIO
from megatron_rpp.algo.sequences import masked_lengths, masked_sums, sequence_of
from megatron_rpp.config.schema import Correction


@dataclass(frozen=True, slots=True)
class Corrected:
    """weight_T: what each token's policy loss is multiplied by, 0 outside mask_T. mask_T: what is left of the mask. No gradient.

    sums, to be added over ranks, for `summarise`: masked tokens, sum of weights, sum of their squares, tokens with a weight above
    0, tokens whose weight was held at a bound, responses with a masked token, responses vetoed. All by the mask given.
    Shapes: weight_T [T] float64, mask_T [T] bool, sums [7] float64
    """

    weight_T: Tensor
    mask_T: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True)
class CorrectionStats:
    """The same over all ranks, as numbers.

    weight_mean, ess_frac: mean and effective sample size of the weights, over the tokens of the original mask. kept_frac: tokens
    with a weight above 0. clipped_frac: tokens whose weight was held at low or high. vetoed_frac: of responses.
    """

    weight_mean: float
    ess_frac: float
    kept_frac: float
    clipped_frac: float
    vetoed_frac: float


def correction_weights(logp_old_T: Tensor, logp_rollout_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, correction: Correction) -> Corrected:
    """The weight of every token and what is left of the mask; the module's text says by which rule.

    log w = logp_old - logp_rollout, each and every sum of them held to +-20 before exp. Where one of the two is nan or infinite
    there is no weight: the token is left out as if outside every range, at the other levels its whole response is, and so it is
    by a veto. kind none gives weight 1 and the mask as it was, whatever the other settings say.

    Shapes: [T], [T], [T] bool, [S+1] -> Corrected of [T]
    """
    length_S = masked_lengths(mask_T, cu_len_S1)
    vetoed_S = torch.zeros_like(length_S, dtype=torch.bool)
    weight_T = on_mask(torch.ones_like(mask_T, dtype=torch.float64), mask_T)
    if correction.kind == "none":
        return Corrected(weight_T, mask_T, _sums(weight_T, mask_T, torch.zeros_like(mask_T), length_S, vetoed_S))

    raw_T = on_mask(logp_old_T.detach().double() - logp_rollout_T.detach().double(), mask_T)
    is_number_T = raw_T.isfinite()
    log_w_T = torch.where(is_number_T, raw_T, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    is_kept_T, judged_T = mask_T & is_number_T, log_w_T.exp()
    sequence_T = sequence_of(cu_len_S1)
    if correction.level != "token":
        is_kept_T = mask_T & (masked_lengths(is_kept_T, cu_len_S1) == length_S)[sequence_T]
        log_S = masked_sums(log_w_T, mask_T, cu_len_S1)
        log_S = log_S if correction.level == "sequence" else log_S / length_S.clamp(min=1)
        judged_T = log_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[sequence_T]
    if correction.veto is not None:
        is_passed_T = mask_T & is_number_T & (raw_T >= math.log(correction.veto))
        vetoed_S = masked_lengths(is_passed_T, cu_len_S1) < length_S
        is_kept_T = is_kept_T & ~vetoed_S[sequence_T]
    if correction.kind == "tis":
        weight_T = on_mask(judged_T.clamp(correction.low, correction.high), is_kept_T)
        is_held_T = is_kept_T & (weight_T != judged_T)
    else:
        is_kept_T = is_kept_T & (correction.low <= judged_T) & (judged_T <= correction.high)
        weight_T, is_held_T = on_mask(log_w_T.exp(), is_kept_T), torch.zeros_like(mask_T)
    sums = _sums(weight_T, mask_T, is_held_T, length_S, vetoed_S)
    return Corrected(weight_T, is_kept_T if correction.kind == "mis" else mask_T, sums)


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
