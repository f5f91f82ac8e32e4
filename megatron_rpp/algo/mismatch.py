"""How far the training engine's log-probabilities are from the roll-out engine's, for the same tokens and the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import masked_sum, on_mask
from megatron_rpp.algo.kl import k3
from megatron_rpp.algo.policy_loss import MAX_LOG_RATIO


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The same over all ranks, as numbers.

    mean_abs, max_abs: of |logp_old - logp_rollout|, in nats. k3: estimate of KL(rollout || old) for a token, in nats.
    ess_frac: effective sample size of the weights exp(logp_old - logp_rollout) as a fraction of the tokens; 1 when equal.
    """

    num_tokens: int
    mean_abs: float
    max_abs: float
    k3: float
    ess_frac: float


def mismatch(logp_old_T: Tensor, logp_rollout_T: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share: sums to be added over ranks, and a maximum to be maximised over ranks.

    d = logp_old - logp_rollout, held to +-20 in the exponent only;  w = exp(d)
    sums = [tokens, sum |d|, sum (w - 1 - d), sum w, sum w^2];  maximum = max |d|
    The first is linear in the data, so summing it over ranks and calling `summarise` gives the global statistic.

    Shapes: [T], [T], [T] bool -> sums [5] float64, maximum [] float64
    """
    d_T = on_mask(logp_old_T.detach().double() - logp_rollout_T.double(), mask_T)
    held_T = d_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    w_T = held_T.exp()
    zero_T = torch.zeros_like(d_T)
    sums = [mask_T.sum().double(), d_T.abs().sum(), k3(zero_T, held_T).sum(), masked_sum(w_T, mask_T), masked_sum(w_T.square(), mask_T)]
    return torch.stack(sums), d_T.abs().max() if d_T.numel() else d_T.sum()


def summarise(sums: Tensor, maximum: Tensor) -> Mismatch:
    """The statistic from sums and maximum over all ranks; all 0 (and ess_frac 1) when there was no token.

    ess_frac = (sum w)^2 / (tokens * sum w^2)
    Shapes: sums [5] float64, maximum [] float64
    """
    num_tokens, total_abs, total_k3, total_w, total_w2 = sums.tolist()
    if num_tokens == 0:
        return Mismatch(0, 0.0, 0.0, 0.0, 1.0)
    return Mismatch(
        num_tokens=int(num_tokens),
        mean_abs=total_abs / num_tokens,
        max_abs=float(maximum),
        k3=total_k3 / num_tokens,
        ess_frac=total_w * total_w / (num_tokens * total_w2),
    )
