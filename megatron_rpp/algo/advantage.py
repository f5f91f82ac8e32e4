"""The advantage of every token, in one call: score -> clip -> baseline -> token rewards -> returns -> global normalisation.

An estimator (estimators.py) is one function from a batch to un-normalised advantages; the normalisation over the global batch is
common to all. This layer knows no process group: the normaliser it is given (stats.moments.whiten) does. Scores have been shaped
before (shaping.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rpp.algo.baselines import Scores, zero_variance_frac
from megatron_rpp.algo.credit_stats import credit_share
from megatron_rpp.algo.estimators import ESTIMATORS
from megatron_rpp.algo.sequences import sequence_of
from megatron_rpp.config.schema import Algo
from megatron_rpp.types import PackedBatch


class Population(Protocol):
    """What a normaliser tells of the values it saw on all ranks, before it changed them. min and max are of single tokens."""

    @property
    def n(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float: ...
    @property
    def min(self) -> float: ...
    @property
    def max(self) -> float: ...


class Normaliser(Protocol):
    """Brings values to mean 0 and variance 1 over the masked tokens of all ranks, or, bound not to, leaves them and measures.

    Entered by every rank, empty ones too. 0 outside the mask either way.
    """

    def __call__(self, x_T: Tensor, mask_T: Tensor, *, sequence_T: Tensor, domain_S: Tensor) -> tuple[Tensor, Population]: ...


@dataclass(frozen=True, slots=True)
class AdvantageStats:
    """What the normalisation saw, over the global batch and equal on every rank; and this rank's share of what it made.

    population_size: masked tokens, or responses with one where stats.population is `sample`. return_*: before the normalisation.
    zero_variance_frac: of the prompts with more than one score, shaped and before the clip, those whose scores are equal.
    share: for credit_stats.summarise, which takes the shares of all data-parallel ranks.
    """

    population_size: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    zero_variance_frac: float
    share: Tensor


def no_advantages(batch: PackedBatch, scores: Scores) -> tuple[Tensor, AdvantageStats]:
    """What `compute_advantages` gives for a step of which no rank keeps a token: every advantage is 0, nothing was measured.

    Shapes: -> adv_T [T] float64
    """
    adv_T = torch.zeros(batch.num_tokens, dtype=torch.float64, device=batch.mask_T.device)
    share = credit_share(adv_T, torch.zeros_like(batch.mask_T), batch.cu_len_S1)
    return adv_T, AdvantageStats(0, 0.0, 0.0, 0.0, 0.0, zero_variance_frac(scores), share)


def compute_advantages(
    batch: PackedBatch, algo: Algo, *, scores: Scores, normaliser: Normaliser, kept_T: Tensor | None = None
) -> tuple[Tensor, AdvantageStats]:
    """The advantage of every token of this rank's batch that the loss will look at, and what the global batch looked like.

    adv = normaliser(ESTIMATORS[algo.estimator](batch, algo, scores)) on kept_T, exactly 0 elsewhere. Values stored outside the
    mask are never read: NaN there does no harm.

    scores: of all responses of the step, equal on every rank. Every rank calls this, with an empty batch too.
    kept_T: the tokens of batch.mask_T that stay in the statistics; None keeps all. A truncated response that is filtered out leaves
    them and the loss, and yet was sampled: its KL, its value and its discount remain in the credit. (What the roll-out correction
    rejects leaves the loss alone: credit.py.)
    Shapes: kept_T [T] bool -> adv_T [T] float64
    Raises: NumericsError, on all ranks alike, when no rank has a kept token or a value is not finite; and for a group
    without a baseline.
    Source: arXiv 2501.03262 Eq. 5 and 7 for what is normalised and when.
    """
    kept_T = batch.mask_T if kept_T is None else batch.mask_T & kept_T
    with torch.no_grad():
        raw_T = ESTIMATORS[algo.estimator](batch, algo, scores)
        adv_T, seen = normaliser(raw_T, kept_T, sequence_T=sequence_of(batch.cu_len_S1), domain_S=batch.domain_S)
        share = credit_share(adv_T, kept_T, batch.cu_len_S1)
    stats = AdvantageStats(
        population_size=seen.n,
        return_mean=seen.mean,
        return_std=seen.std,
        return_min=seen.min,
        return_max=seen.max,
        zero_variance_frac=zero_variance_frac(scores),
        share=share,
    )
    return adv_T, stats
