"""Generalised advantage estimation: what a critic's values make of rewards, over the tokens that the policy wrote."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algo.baselines import clip_scores
from megatron_rpp.algo.returns import discounted_sums, token_rewards
from megatron_rpp.algo.sequences import masked_lengths, sequence_of
from megatron_rpp.config.schema import Algo
from megatron_rpp.types import PackedBatch


def gae(
    reward_T: Tensor, value_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, *, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages and the returns that the critic learns from.

    With t' the next masked token of the same sequence, and value and adv 0 after the last one:
    delta[t]  = reward[t] + gamma * value[t'] - value[t]
    adv[t]    = delta[t] + gamma * lam * adv[t']
    return[t] = adv[t] + value[t]
    All 0 outside the mask. A tool's answer between t and t' neither decays nor brings in its own value. The value after the
    last token is 0 for a truncated response too: truncation counts as an end.

    lam: one number, or one for each sequence.
    Shapes: reward_T, value_T [T], mask_T [T] bool, cu_len_S1 [S+1], lam [S] -> [T], [T] float64
    Source: arXiv 1506.02438 Eq. 11, 12, 16. Interior masks as verl, NeMo-RL and AReaL; OpenRLHF decays through them.
    """
    sequence_N = sequence_of(cu_len_S1)[mask_T]
    reward_N, value_N = reward_T.double()[mask_T], value_T.detach().double()[mask_T]
    is_followed_N = torch.zeros_like(mask_T[mask_T])
    is_followed_N[:-1] = sequence_N[1:] == sequence_N[:-1]
    delta_N = reward_N + gamma * torch.where(is_followed_N, value_N.roll(-1), 0.0) - value_N
    decay = gamma * (lam.to(delta_N)[sequence_N] if isinstance(lam, Tensor) else lam)
    adv_T, return_T = (torch.zeros(reward_T.shape, dtype=torch.float64, device=reward_T.device) for _ in range(2))
    adv_T[mask_T] = discounted_sums(delta_N, sequence_N, decay)
    return_T[mask_T] = adv_T[mask_T] + value_N
    return adv_T, return_T


def length_lambda(length_S: Tensor, alpha: float) -> Tensor:
    """The lambda of each response by its length, so that a longer one looks further ahead; 0 where alpha * length < 1.

    lam = max(0, 1 - 1 / (alpha * length))
    Shapes: length_S [S] int64, in masked tokens -> [S] float64
    Source: VAPO arXiv 2504.05118 section 4.2 (alpha 0.05).
    """
    return (1.0 - 1.0 / (alpha * length_S.double())).clamp(min=0.0)


def critic_returns(batch: PackedBatch, algo: Algo, lam: float | None = None) -> Tensor:
    """What the critic's values should become: the returns of `gae` with the critic's own lambda.

    return[t] = value[t] + sum_l (gamma * lam)^l * delta[t + l]
    With lam 1 this is the discounted sum of the rewards: the values cancel.

    lam: critic.gae_lambda; None takes algo.gae_lambda, or 1 where algo.gae_length_alpha is set, which is the policy's alone.
    Shapes: -> [T] float64, 0 outside mask_T
    Raises: ValueError when the batch lacks value_T, or the log-probabilities that a KL penalty needs.
    Source: decoupled GAE, VC-PPO arXiv 2503.01491 and VAPO arXiv 2504.05118 section 4.1: lambda 1 for the critic, less for
    the policy.
    """
    if lam is None:
        lam = algo.gae_lambda if algo.gae_length_alpha is None else 1.0
    return credit(batch, algo, lam=lam)[1]


def credit(batch: PackedBatch, algo: Algo, *, lam: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`gae` of a batch: its clipped scores, its KL penalty, its critic's values.

    lam: None takes algo's own, gae_lambda or that of the length.
    Shapes: -> [T], [T] float64
    Raises: ValueError when the batch lacks value_T, or the log-probabilities that a KL penalty needs.
    Source: PPO for language models, arXiv 1909.08593 section 2.
    """
    if batch.value_T is None:
        raise ValueError("estimator gae needs the critic's estimates: the batch lacks value_T")
    if lam is None and algo.gae_length_alpha is not None:
        lam = length_lambda(masked_lengths(batch.mask_T, batch.cu_len_S1), algo.gae_length_alpha)
    reward_T = token_rewards(batch, clip_scores(batch.score_S, algo.reward_clip), algo.kl_reward_coef, algo.kl_reward)
    return gae(reward_T, batch.value_T, batch.mask_T, batch.cu_len_S1, gamma=algo.gamma, lam=algo.gae_lambda if lam is None else lam)
