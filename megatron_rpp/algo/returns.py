"""From the score of a response to the reward and the return of each of its tokens. Whole responses, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algo.kl import ESTIMATES
from megatron_rpp.algo.sequences import last_masked, masked_sums, sequence_of
from megatron_rpp.config.schema import KlName
from megatron_rpp.types import PackedBatch


def kl_per_token(batch: PackedBatch, kl: KlName = "k1") -> Tensor:
    """The divergence of the roll-out's policy from the reference at each token it sampled; 0 outside mask_T.

    Shapes: -> [T] float64. Units: nats.
    Raises: ValueError when the batch lacks the log-probabilities.
    Source: arXiv 2501.03262 Eq. 4 (k1). Tool tokens inside a response pay nothing (slime#1372; miles#1383 still charges them).
    """
    if batch.logp_old_T is None or batch.logp_ref_T is None:
        raise ValueError("kl_reward_coef is not 0, so the batch needs logp_old_T and logp_ref_T; it lacks one")
    kl_T = ESTIMATES[kl](batch.logp_old_T.double(), batch.logp_ref_T.double())
    return torch.where(batch.mask_T, kl_T, 0.0)


def token_rewards(batch: PackedBatch, score_S: Tensor, kl_reward_coef: float, kl: KlName = "k1") -> Tensor:
    """The reward of each token: the score on the last token the policy sampled, minus the KL penalty everywhere it sampled.

    reward[t] = 1[t is the last masked token of its sequence] * score - kl_reward_coef * kl(logp_old[t], logp_ref[t])
    and 0 outside mask_T. A sequence with no masked token receives no score. score_S is a parameter and not batch.score_S,
    because it has been clipped, and centred in some estimators, before.

    Shapes: score_S [S] -> [T] float64
    Raises: ValueError, from `kl_per_token`, when a penalty is asked for and the batch lacks the log-probabilities.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 4.
    """
    last_S = last_masked(batch.mask_T, sequence_of(batch.cu_len_S1), batch.num_sequences)
    reward_T = torch.zeros(batch.num_tokens, dtype=torch.float64, device=batch.mask_T.device)
    if kl_reward_coef != 0.0:
        reward_T = reward_T - kl_reward_coef * kl_per_token(batch, kl)
    has_token_S = last_S >= 0
    return reward_T.index_add(0, last_S[has_token_S], score_S.double()[has_token_S])


def kl_penalties(batch: PackedBatch, kl_reward_coef: float, kl: KlName = "k1") -> Tensor:
    """What a whole response pays: kl_reward_coef * sum over its masked tokens of kl(logp_old, logp_ref).

    The same bits wherever a response is packed, so that a group's penalties can be gathered (Scores.penalty_S) and compared.
    Shapes: -> [S] float64. Units: those of a score.
    Raises: ValueError, from `kl_per_token`, when the batch lacks the log-probabilities.
    Source: RLOO arXiv 2402.14740 section 2: R(x, y) = r(x, y) - beta * log(pi(y | x) / pi_ref(y | x)).
    """
    return kl_reward_coef * masked_sums(kl_per_token(batch, kl), batch.mask_T, batch.cu_len_S1)


def compute_returns(reward_T: Tensor, mask_T: Tensor, cu_len_S1: Tensor, gamma: float) -> Tensor:
    """Discounted reward-to-go of each masked token.

    return[t] = reward[t] + gamma * return[next masked token of the same sequence]; 0 outside the mask.
    Only masked tokens count: a tool's answer in the middle neither adds reward nor decays it.

    Shapes: reward_T [T], mask_T [T] bool, cu_len_S1 [S+1] -> [T] float64
    Source: REINFORCE++ arXiv 2501.03262 Eq. 4 (gamma = 1). Differs from verl's compute_reinforce_plus_plus, which restarts at
    every unmasked token (verl#7278), and from OpenRLHF, where gamma decays through unmasked tokens.
    """
    return_T = torch.zeros(reward_T.shape, dtype=torch.float64, device=reward_T.device)
    return_T[mask_T] = discounted_sums(reward_T.double()[mask_T], sequence_of(cu_len_S1)[mask_T], gamma)
    return return_T


def discounted_sums(x_N: Tensor, sequence_N: Tensor, decay: float | Tensor) -> Tensor:
    """out[n] = x[n] + decay * out[n + 1] inside each sequence, for the N masked tokens of a batch without those between them.

    Done by doubling: after round k each token holds the sum over its next 2^k tokens, so ceil(log2(longest)) rounds of one
    shift, multiply and add are enough. Nothing is divided by a power of the decay and nothing is subtracted, so it is as
    accurate for 32k tokens as for 3; the additions form a tree that depends on the tokens from n to the end of its own
    sequence only, so a response's bits do not depend on what it is packed with.

    decay: one number, or one for each token that is the same throughout a sequence.
    Shapes: x_N [N] float64, sequence_N [N] int64 ascending, decay [N] -> [N]
    Source: the doubling is that of Hillis and Steele, "Data parallel algorithms" (1986).
    """
    stride, longest = 1, _longest(sequence_N)
    while stride < longest:
        is_same_N = sequence_N[stride:] == sequence_N[:-stride]
        later_N = torch.where(is_same_N, x_N[stride:], 0.0)
        weight = decay if isinstance(decay, float | int) else decay[:-stride]
        x_N = torch.cat([x_N[:-stride] + weight * later_N, x_N[-stride:]])
        stride, decay = 2 * stride, decay * decay
    return x_N


def _longest(sequence_N: Tensor) -> int:
    """The largest number of masked tokens in one sequence."""
    return int(sequence_N.bincount().max()) if sequence_N.numel() else 0
