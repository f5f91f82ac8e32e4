"""One function for each estimator: from scores to the advantage of every token, before any normalisation.

The normalisation over the global batch is common to those that have one and comes after (advantage.py). In all of them scores are
clipped before they are compared, a score stands on the last token that the policy wrote, and gamma counts its tokens only; with
gamma 1 and no KL in the reward an estimator that compares whole responses is constant in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rpp.algo import gae as critic
from megatron_rpp.algo.baselines import Scores, clip_scores, greedy_baseline, group_mean_baseline, group_std, leave_one_out_baseline
from megatron_rpp.algo.returns import compute_returns, kl_penalties, token_rewards
from megatron_rpp.algo.sequences import sequence_of
from megatron_rpp.config.schema import Algo, EstimatorName
from megatron_rpp.types import PackedBatch

Estimator = Callable[[PackedBatch, Algo, Scores], Tensor]


def reinforce_pp(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """REINFORCE++: the clipped score less the KL still to come, with no baseline but the batch's own mean.

    raw[t] = gamma^(left) * clip(score) - kl_reward_coef * sum_{s >= t} gamma^(s - t) * kl(logp_old[s], logp_ref[s])
    over masked tokens, `left` of them after t. Any number of responses to a prompt, one included.

    Shapes: -> [T] float64, 0 outside mask_T
    Source: arXiv 2501.03262 Eq. 1 and 4. As OpenRLHF's `reinforce`.
    """
    return _to_go(batch, algo, clip_scores(batch.score_S, algo.reward_clip))


def reinforce_pp_baseline(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """REINFORCE++ with a group baseline: the clipped score less the mean clipped score of its prompt, on every token.

    raw[t] = gamma^(left) * (clip(score) - mean over the group of clip(score)) - the same KL term as `reinforce_pp`
    The paper keeps the KL out of the reward here (k2 in the loss, algo.kl_loss_coef) and gamma at 1. With kl_reward_coef != 0 the
    penalty is the suffix sum, as in OpenRLHF (slime and verl mean other things).

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: NumericsError for a prompt with a single response.
    Source: arXiv 2501.03262 Eq. 6 to 8. As OpenRLHF's `reinforce_baseline`, except that scores are clipped before the mean.
    """
    return _to_go(batch, algo, _centred(batch, algo, scores))


def rloo(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """RLOO: a response's score less the mean score of the others to its prompt, on every token.

    R = clip(score) - kl_reward_coef * sum over the response of kl(logp_old, logp_ref)
    raw[t] = gamma^(left) * (R[i] - mean over j != i in the group of R[j])
    The response is one action: its whole KL is in its score, before the baseline. OpenRLHF and TRL subtract it by token after.

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: NumericsError for a prompt with a single response; ValueError when a KL coefficient is set and the scores lack penalty_S.
    Source: arXiv 2402.14740 Eq. 8 and section 2.
    """
    own_S, everyone = _clipped(batch, algo, scores)
    if algo.kl_reward_coef != 0.0:
        if scores.penalty_S is None:
            raise ValueError("estimator rloo with kl_reward_coef needs the penalties of whole groups: Scores.penalty_S is missing")
        own_S = own_S - kl_penalties(batch, algo.kl_reward_coef, algo.kl_reward)
        everyone = replace(everyone, score_S=everyone.score_S - scores.penalty_S.double())
    return _to_go(batch, algo, own_S - leave_one_out_baseline(everyone, batch.group_S, own_S), kl_reward_coef=0.0)


def remax(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """ReMax: the return of `reinforce_pp` less the score of the greedy response to the same prompt.

    raw[t] = reinforce_pp(t) - clip(greedy score)
    The greedy score pays no KL: it is a constant of the prompt, and any such constant keeps the gradient unbiased.

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: ValueError when the scores lack greedy_P; NumericsError for a greedy score that is not finite.
    Source: arXiv 2310.10505 Algorithm 2. As verl's `remax`.
    """
    greedy_S = clip_scores(greedy_baseline(scores, batch.group_S), algo.reward_clip)
    return_T = reinforce_pp(batch, algo, scores)
    return torch.where(batch.mask_T, return_T - greedy_S[sequence_of(batch.cu_len_S1)], return_T)


def grpo(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """GRPO: the centred score in units of the scores' deviation.

    raw[t] = gamma^(left) * (clip(score) - mean of its group) / (std + grpo_std_eps) - the same KL term as `reinforce_pp`
    std: of the group's clipped scores, or with grpo_std batch of the whole batch's (not of the centred ones, which is what
    REINFORCE++-baseline divides by). A group of equal scores gives exactly 0, with any eps. The paper has its KL in the loss.

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: NumericsError for a prompt with a single response.
    Source: arXiv 2402.03300 section 4.1.2; n - 1 and 1e-6 as verl, slime, NeMo-RL; batch as TRL's scale_rewards="batch".
    """
    _, everyone = _clipped(batch, algo, scores)
    centred_S = _centred(batch, algo, scores)
    group_S = batch.group_S
    if algo.grpo_std == "batch":
        everyone, group_S = replace(everyone, group_S=torch.zeros_like(everyone.group_S)), torch.zeros_like(group_S)
    std_S = group_std(everyone, group_S, unbiased=algo.grpo_std_unbiased)
    return _to_go(batch, algo, torch.where(centred_S == 0, 0.0, centred_S / (std_S + algo.grpo_std_eps)))


def dr_grpo(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """Dr. GRPO: the centred score as it is; (k - 1) / k times RLOO's. Its other half is aggregate constant_length.

    raw[t] = gamma^(left) * (clip(score) - mean of its group) - the same KL term as `reinforce_pp`

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: NumericsError for a prompt with a single response.
    Source: arXiv 2503.20783 Eq. 3.
    """
    return _to_go(batch, algo, _centred(batch, algo, scores))


def gae(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """PPO with a critic: gae.gae of the clipped score and the KL penalty by token.

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: ValueError when the batch lacks value_T.
    Source: arXiv 1506.02438 Eq. 16; lambda by length VAPO arXiv 2504.05118.
    """
    return critic.credit(batch, algo)[0]


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "rloo": rloo,
    "remax": remax,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "gae": gae,
}


def _clipped(batch: PackedBatch, algo: Algo, scores: Scores) -> tuple[Tensor, Scores]:
    """This rank's scores and everyone's, clipped alike."""
    everyone = replace(scores, score_S=clip_scores(scores.score_S, algo.reward_clip))
    return clip_scores(batch.score_S, algo.reward_clip), everyone


def _centred(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    own_S, everyone = _clipped(batch, algo, scores)
    return own_S - group_mean_baseline(everyone, batch.group_S)


def _to_go(batch: PackedBatch, algo: Algo, credit_S: Tensor, kl_reward_coef: float | None = None) -> Tensor:
    """A response's credit on its last token, the KL penalty on all, summed from each token to the end."""
    coef = algo.kl_reward_coef if kl_reward_coef is None else kl_reward_coef
    reward_T = token_rewards(batch, credit_S, coef, algo.kl_reward)
    return compute_returns(reward_T, batch.mask_T, batch.cu_len_S1, algo.gamma)
