"""The advantage of every token, in one call: score -> clip -> baseline -> token rewards -> returns -> global normalisation.

An estimator is one function from a batch to un-normalised advantages; the normalisation over the global batch is common to
all. This layer knows no process group: the normaliser it is given (stats.moments.whiten) does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_rpp.algo.baselines import Scores, clip_scores, group_mean_baseline
from megatron_rpp.algo.returns import compute_returns, token_rewards
from megatron_rpp.algo.sequences import sequence_of
from megatron_rpp.config.schema import Algo, EstimatorName
from megatron_rpp.types import PackedBatch


class Population(Protocol):
    """What a normaliser tells of the values it saw on all ranks. min and max are of single tokens; scale is what it multiplied by."""

    @property
    def n(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def min(self) -> float: ...
    @property
    def max(self) -> float: ...


class Normaliser(Protocol):
    """Brings values to mean 0 and variance 1 over the masked tokens of all ranks. Entered by every rank, empty ones too."""

    def __call__(self, x_T: Tensor, mask_T: Tensor, *, sequence_T: Tensor, domain_S: Tensor) -> tuple[Tensor, Population]: ...


@dataclass(frozen=True, slots=True)
class AdvantageStats:
    """What the normalisation saw and made, over the global batch; equal on every rank.

    population_size: masked tokens, or responses with one where algo.norm_population is `sample`. return_*: before the
    normalisation. adv_min, adv_max: after it.
    """

    population_size: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    adv_min: float
    adv_max: float


Estimator = Callable[[PackedBatch, Algo, Scores], Tensor]


def reinforce_pp(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """REINFORCE++: the clipped score less the KL still to come, with no baseline but the batch's own mean.

    raw[t] = gamma^(left) * clip(score) - kl_reward_coef * sum_{s >= t} gamma^(s - t) * (logp_old[s] - logp_ref[s])
    over masked tokens, `left` of them after t. Any number of responses to a prompt, one included.

    Shapes: -> [T] float64, 0 outside mask_T
    Source: arXiv 2501.03262 Eq. 1 and 4. As OpenRLHF's `reinforce`.
    """
    reward_T = token_rewards(batch, clip_scores(batch.score_S, algo.reward_clip), algo.kl_reward_coef)
    return compute_returns(reward_T, batch.mask_T, batch.cu_len_S1, algo.gamma)


def reinforce_pp_baseline(batch: PackedBatch, algo: Algo, scores: Scores) -> Tensor:
    """REINFORCE++ with a group baseline: the clipped score less the mean clipped score of its prompt, on every token.

    raw[t] = gamma^(left) * (clip(score) - mean over the group of clip(score)) - the same KL term as `reinforce_pp`
    The paper keeps the KL out of the reward here (k2 in the loss, algo.kl_loss_coef) and gamma at 1; then raw is constant in
    a response. With kl_reward_coef != 0 the penalty is the suffix sum, as in OpenRLHF (slime and verl mean other things).

    Shapes: -> [T] float64, 0 outside mask_T
    Raises: NumericsError for a prompt with a single response.
    Source: arXiv 2501.03262 Eq. 6 to 8. As OpenRLHF's `reinforce_baseline`, except that scores are clipped before the mean.
    """
    clipped = Scores(clip_scores(scores.score_S, algo.reward_clip), scores.group_S, scores.prompt_uids)
    centred_S = clip_scores(batch.score_S, algo.reward_clip) - group_mean_baseline(clipped, batch.group_S)
    reward_T = token_rewards(batch, centred_S, algo.kl_reward_coef)
    return compute_returns(reward_T, batch.mask_T, batch.cu_len_S1, algo.gamma)


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def compute_advantages(batch: PackedBatch, algo: Algo, *, scores: Scores, normaliser: Normaliser) -> tuple[Tensor, AdvantageStats]:
    """The normalised advantage of every masked token of this rank's batch, and what the global batch looked like.

    adv[t] = (raw[t] - mean) * rsqrt(max(variance, 1e-8)) on the mask, exactly 0 elsewhere; mean and population variance over
    the masked tokens of all ranks (algo.norm_population: sample weighs each response once), the mean left in place when
    algo.norm_recentre is off. Values stored outside the mask are never read: NaN there does no harm.

    scores: of all responses of the step, equal on every rank. Every rank calls this, with an empty batch too.
    Shapes: -> adv_T [T] float64
    Raises: NumericsError, on all ranks alike, when no rank has a masked token or a value is not finite; and for a group
    without a baseline.
    Source: arXiv 2501.03262 Eq. 5 and 7; the floor on the variance as OpenRLHF and NeMo-RL.
    """
    with torch.no_grad():
        raw_T = ESTIMATORS[algo.estimator](batch, algo, scores)
        adv_T, seen = normaliser(
            raw_T,
            batch.mask_T,
            sequence_T=sequence_of(batch.cu_len_S1),
            domain_S=batch.domain_S,
        )
    return adv_T, _stats(seen, algo)


def _stats(seen: Population, algo: Algo) -> AdvantageStats:
    centre = seen.mean if algo.norm_recentre else 0.0
    return AdvantageStats(
        population_size=seen.n,
        return_mean=seen.mean,
        return_std=seen.std,
        return_min=seen.min,
        return_max=seen.max,
        adv_min=(seen.min - centre) * seen.scale,
        adv_max=(seen.max - centre) * seen.scale,
    )
