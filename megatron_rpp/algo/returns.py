"""From the score of a response to the reward and the return of each of its tokens. Whole responses, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algo.kl import k1
from megatron_rpp.algo.sequences import last_masked, sequence_of
from megatron_rpp.types import PackedBatch


def token_rewards(batch: PackedBatch, score_S: Tensor, kl_reward_coef: float) -> Tensor:
    """The reward of each token: the score on the last token the policy sampled, minus the KL penalty everywhere it sampled.

    reward[t] = 1[t is the last masked token of its sequence] * score - kl_reward_coef * (logp_old[t] - logp_ref[t])
    and 0 outside mask_T. A sequence with no masked token receives no score. score_S is a parameter and not batch.score_S,
    because it has been clipped, and centred in some estimators, before.

    Shapes: score_S [S] -> [T] float64
    Raises: ValueError when a penalty is asked for and the batch lacks the log-probabilities.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 4. Tool tokens inside a response pay no KL (miles still charges them).
    """
    sequence_T = sequence_of(batch.cu_len_S1)
    last_S = last_masked(batch.mask_T, sequence_T, batch.num_sequences)
    reward_T = torch.zeros(batch.num_tokens, dtype=torch.float64, device=batch.mask_T.device)
    if kl_reward_coef != 0.0:
        if batch.logp_old_T is None or batch.logp_ref_T is None:
            raise ValueError("kl_reward_coef is not 0, so the batch needs logp_old_T and logp_ref_T; it lacks one")
        penalty_T = kl_reward_coef * k1(batch.logp_old_T.double(), batch.logp_ref_T.double())
        reward_T = torch.where(batch.mask_T, -penalty_T, reward_T)
    has_token_S = last_S >= 0
    return reward_T.index_add(0, last_S[has_token_S], score_S.double()[has_token_S])


def compute_returns(reward_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, gamma: float) -> Tensor:
    """Discounted reward-to-go of each masked token.

    return[t] = reward[t] + gamma * return[next masked token of the same sequence]; 0 outside the mask.
    Only masked tokens count: a tool's answer in the middle neither adds reward nor decays it.

    Done by doubling: after round k each token holds the sum over its next 2^k masked tokens, so ceil(log2(longest)) rounds
    of one shift, multiply and add are enough. Nothing is divided by a power of gamma and nothing is subtracted, so it is as
    accurate for 32k tokens as for 3; the additions form a tree that depends on the tokens from t to the end of its own
    sequence only, so a response's bits do not depend on what it is packed with.

    Shapes: reward_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> [T] float64
    Source: REINFORCE++ arXiv 2501.03262 Eq. 4 (gamma = 1). Differs from verl's compute_reinforce_plus_plus, which restarts at
    every unmasked token (verl#7278), and from OpenRLHF, where gamma decays through unmasked tokens.
    """
    sequence_N = sequence_of(cu_len_S1)[mask_T]
    return_N = reward_T.double()[mask_T]
    stride, weight, longest = 1, gamma, _longest(sequence_N)
    while stride < longest:
        is_same_N = sequence_N[stride:] == sequence_N[:-stride]
        later_N = torch.where(is_same_N, return_N[stride:], 0.0)
        return_N = torch.cat([return_N[:-stride] + weight * later_N, return_N[-stride:]])
        stride, weight = 2 * stride, weight * weight
    return_T = torch.zeros(reward_T.shape, dtype=torch.float64, device=reward_T.device)
    return_T[mask_T] = return_N
    return return_T


def _longest(sequence_N: Tensor) -> int:
    """The largest number of masked tokens in one sequence."""
    return int(sequence_N.bincount().max()) if sequence_N.numel() else 0
