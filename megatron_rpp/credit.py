"""From the scores of a step to what the losses multiply by: the formulas of algo, given what other ranks hold.

Order: shaping of the scores, advantages and their statistic over what is not filtered, then what the update may look at: without
truncated responses where they are filtered, with the weights of the roll-out correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_rpp.algo import correction, credit_stats, shaping
from megatron_rpp.algo.advantage import AdvantageStats, compute_advantages, no_advantages
from megatron_rpp.algo.baselines import Scores
from megatron_rpp.algo.gae import critic_returns
from megatron_rpp.algo.returns import kl_penalties, kl_per_token
from megatron_rpp.config.schema import Algo, Config, Reward
from megatron_rpp.config.validate_algo import normalises
from megatron_rpp.data.packing import assign_ranks
from megatron_rpp.dist.collectives import all_gather, gather_objects, sum_float64, sum_int64
from megatron_rpp.dist.float8 import gathers_float8
from megatron_rpp.dist.groups import Groups
from megatron_rpp.stats.moments import distributed_mean, distributed_moments, whiten
from megatron_rpp.types import Group, PackedBatch, Response


@dataclass(frozen=True, slots=True)
class Credited:
    """A batch that is ready for the update. batch: with weights, and the mask that is left. return_T: the critic's targets, or None.

    metrics: of the whole step, equal on every rank.
    """

    batch: PackedBatch
    adv_T: Tensor
    return_T: Tensor | None
    metrics: dict[str, float]


class Credit:
    """The settings of credit, bound to the ranks that share a batch. Every rank makes one and calls `assign`, also without a sequence.

    sends_float8: the statistics travel in the type float8_e4m3fn; False where the same bytes go as uint8, or with another wire.
    """

    def __init__(self, cfg: Config, groups: Groups, *, deadline_s: float) -> None:
        self._cfg, self._groups, self._deadline_s = cfg, groups, deadline_s
        stats = cfg.stats
        self.sends_float8 = stats.wire == "fp8" and gathers_float8(groups.dp, deadline_s=deadline_s)
        self._normaliser = partial(
            whiten,
            group=groups.dp,
            population=stats.population,
            scope=stats.scope,
            recentre=stats.recentre,
            rescale=normalises(cfg.algo, stats),
            wire=stats.wire,
            limbs=stats.limbs,
            native_float8=self.sends_float8,
            deadline_s=deadline_s,
        )

    def assign(self, batch: PackedBatch, groups_P: Sequence[Group], algo: Algo) -> Credited:
        """The advantage of every token that the losses may look at. Where filtering leaves none on any rank, all are 0.

        groups_P: of the whole step, equal on every rank. algo: that of the step, with the KL coefficient of the moment.
        Shapes: adv_T, return_T [T] float64
        Raises: NumericsError, on every rank alike.
        """
        corrected = correction.correction_weights(
            batch.logp_old_T, batch.logp_rollout_T, batch.mask_T, batch.cu_len_S1, self._cfg.correction
        )
        max_tokens = self._cfg.rollout.max_response_tokens
        scores = shaping.shape_scores(self._scores(batch, groups_P, algo), self._cfg.reward, max_tokens=max_tokens)
        batch = shaping.shape_batch(batch, self._cfg.reward, max_tokens=max_tokens)
        kept_T = shaping.drop_truncated(batch).mask_T if algo.filter_truncated else batch.mask_T
        normaliser = partial(self._normaliser, num_domains=len({group.prompt.domain for group in groups_P}))
        if self._num_tokens(kept_T) > 0:
            adv_T, stats = compute_advantages(batch, algo, scores=scores, normaliser=normaliser, kept_T=kept_T)
        else:  # every response was filtered out: the update makes no optimizer step
            adv_T, stats = no_advantages(batch, scores)
        return_T = critic_returns(batch, algo, self._cfg.critic.gae_lambda) if algo.estimator == "gae" else None
        metrics = self._metrics(stats, corrected)
        if algo.kl_reward_coef != 0.0:
            metrics["adv/kl_reward"] = self._mean(kl_per_token(batch, algo.kl_reward), batch.mask_T)
        # What the correction leaves out of the loss was sampled all the same, and counts above.
        batch = replace(batch, mask_T=kept_T & corrected.mask_T)
        if self._cfg.correction.is_on:
            weight_T = corrected.weight_T
            if self._cfg.correction.weight_normalize:
                metrics["correction/normalizer"] = mean = self._mean_weight(weight_T, kept_T & corrected.kept_T)
                weight_T = correction.normalized(weight_T, mean)
            batch = replace(batch, weight_T=weight_T.float())
        return Credited(batch, adv_T, return_T, metrics)

    def _scores(self, batch: PackedBatch, groups_P: Sequence[Group], algo: Algo) -> Scores:
        """Of all responses of the step: a group's mean needs them wherever they are packed."""
        flat = [(number, response) for number, group in enumerate(groups_P) for response in group.responses]
        scores = Scores(
            score_S=torch.tensor([response.score for _, response in flat], dtype=torch.float64),
            group_S=torch.tensor([number for number, _ in flat], dtype=torch.int64),
            prompt_uids=tuple(group.prompt.uid for group in groups_P),
            lengths_S=torch.tensor([len(response.tokens) for _, response in flat], dtype=torch.int64),
            is_truncated_S=torch.tensor([response.is_truncated for _, response in flat], dtype=torch.bool),
        )
        if algo.estimator == "remax":
            scores = replace(scores, greedy_P=self._greedy_scores([group.greedy for group in groups_P]))
        if algo.estimator == "rloo" and algo.kl_reward_coef != 0.0:
            scores = replace(scores, penalty_S=self._penalties(batch, groups_P, algo))
        return scores

    def _greedy_scores(self, greedy_P: Sequence[Response]) -> Tensor:
        """Shaped as the sampled responses' are, so that the same response is worth the same on both sides."""
        return shaping.shaped(
            torch.tensor([response.score for response in greedy_P], dtype=torch.float64),
            torch.tensor([len(response.tokens) for response in greedy_P], dtype=torch.int64),
            torch.tensor([response.is_truncated for response in greedy_P], dtype=torch.bool),
            self._cfg.reward,
            max_tokens=self._cfg.rollout.max_response_tokens,
        )

    def _penalties(self, batch: PackedBatch, groups_P: Sequence[Group], algo: Algo) -> Tensor:
        """The KL penalty of every response of the step, in their global order."""
        mine = (self._groups.coords.dp, kl_penalties(batch, algo.kl_reward_coef, algo.kl_reward).tolist())
        shares = dict(gather_objects(mine, self._groups.world_cpu, name="KL penalties of all responses", deadline_s=self._deadline_s))
        owners = assign_ranks(groups_P, self._groups.dp_size, num_minibatches=algo.minibatches)
        rest = {rank: iter(share) for rank, share in shares.items()}
        return torch.tensor([next(rest[owner]) for owner in owners], dtype=torch.float64)

    def _num_tokens(self, mask_T: Tensor) -> int:
        """Of all ranks."""
        return int(sum_int64(mask_T.sum(), self._groups.dp, name="tokens of the step", deadline_s=self._deadline_s))

    def _mean(self, x_T: Tensor, mask_T: Tensor) -> float:
        """Over the masked tokens of all ranks, the same bits however they are split: a KL coefficient may follow it."""
        return distributed_moments(x_T, mask_T, self._groups.dp, name="KL of all ranks", deadline_s=self._deadline_s).mean

    def _mean_weight(self, weight_T: Tensor, kept_T: Tensor) -> float:
        """Over the tokens that the loss sees with a weight; 1 where there is none."""
        return distributed_mean(weight_T, kept_T, self._groups.dp, empty=1.0, name="weights of all ranks", deadline_s=self._deadline_s)

    def _metrics(self, stats: AdvantageStats, corrected: correction.Corrected) -> dict[str, float]:
        group, wait = self._groups.dp, {"deadline_s": self._deadline_s}
        summary = credit_stats.summarise(all_gather(stats.share, group, name="advantages of all ranks", **wait))
        seen = {name: value for name, value in asdict(stats).items() if name != "share"}
        found = {f"adv/{name}": float(value) for name, value in (seen | asdict(summary)).items()}
        if self._cfg.correction.is_on:
            weights = correction.summarise(sum_float64(corrected.sums, group, name="correction of all ranks", **wait))
            found |= {f"correction/{name}": value for name, value in asdict(weights).items()}
        return found


def truncation_warning(groups_P: Sequence[Group], reward: Reward) -> str | None:
    """What is wrong where reward.truncated_coef raises a score: a negative one, which it brings nearer to 0. None where it does not."""
    if reward.truncated_coef in (None, 1.0):
        return None
    for response in (response for group in groups_P for response in group.everything):
        if response.is_truncated and response.score < 0:
            better = reward.truncated_coef * response.score + 0.0  # not -0
            return (
                f"reward.truncated_coef {reward.truncated_coef:g} rewards truncation: response {response.prompt_uid}/{response.sample} "
                f"scored {response.score:g}, was cut off and gets {better:g}; where scores are negative set reward.truncated_score, "
                "not above the lowest of them, in place of the coefficient"
            )
    return None
