"""What a response's score is compared with. Scalar work on the scores of the whole roll-out batch, exact and order-free."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.errors import NumericsError


@dataclass(frozen=True, slots=True)
class Scores:
    """The raw scores of all responses of a step, equal on every rank.

    A group may be split over data-parallel ranks, so its mean cannot be had from one rank's batch.
    Shapes: score_S [all responses] float64, group_S [all responses] int64. prompt_uids: group_S's values index it.
    """

    score_S: Tensor
    group_S: Tensor
    prompt_uids: tuple[str, ...] = ()

    def name_of(self, group: int) -> str:
        """A group as an error message should call it."""
        return f"prompt {self.prompt_uids[group]}" if 0 <= group < len(self.prompt_uids) else f"group {group}"


def clip_scores(score_S: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Scores held inside `bounds`; None leaves them. In float64. Done before any baseline, as the paper does (OpenRLHF: after).

    Shapes: [S] -> [S] float64
    """
    return score_S.double() if bounds is None else score_S.double().clamp(*bounds)


def group_mean_baseline(scores: Scores, group_S: Tensor, *, min_size: int = 2) -> Tensor:
    """The mean score of each asked sequence's group, its own score included.

    baseline[i] = mean of scores.score_S[j] over all j with scores.group_S[j] == group_S[i]
    The sum is exactly rounded (math.fsum), so the order of the responses does not show in the bits, and equal scores have
    exactly their own value as the mean: a centred score of 0, not of 1e-17.

    min_size: the smallest group that has a baseline. A single response is its own mean and would teach nothing, silently.
    Shapes: group_S [S] int64, ids as in scores -> [S] float64 on group_S's device
    Raises: NumericsError for a group smaller than min_size, and for a score that is not finite, naming the prompt.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 6 (inclusive mean). Groups go by id, never by position (OpenRLHF reshapes).
    """
    members: dict[int, list[float]] = defaultdict(list)
    for group, score in zip(scores.group_S.tolist(), scores.score_S.tolist(), strict=True):
        members[group].append(score)
    mean_of = {group: _mean(values, scores.name_of(group), min_size) for group, values in members.items()}
    return torch.tensor([mean_of[group] for group in group_S.tolist()], dtype=torch.float64, device=group_S.device)


def is_informative(scores: Scores) -> Tensor:
    """True for a response whose group has unequal scores. Told by max == min: a computed deviation of equal floats is not 0.

    Shapes: -> [all responses] bool
    """
    group_S = scores.group_S.unique(return_inverse=True)[1]
    num_groups = int(group_S.max()) + 1 if group_S.numel() else 0
    empty_P = torch.zeros(num_groups, dtype=scores.score_S.dtype)
    high_P = empty_P.scatter_reduce(0, group_S, scores.score_S, reduce="amax", include_self=False)
    low_P = empty_P.scatter_reduce(0, group_S, scores.score_S, reduce="amin", include_self=False)
    return (high_P > low_P)[group_S]


def _mean(values: list[float], name: str, min_size: int) -> float:
    if len(values) < min_size:
        raise NumericsError(
            f"a group of {len(values)} has no baseline",
            where=f"group mean of {name}",
            expected=f"at least {min_size} responses to every prompt",
            got=len(values),
            fix="raise rollout.samples_per_prompt, or use algo.estimator: reinforce_pp, which needs no group",
        )
    if not all(map(math.isfinite, values)):
        raise NumericsError("a score is not finite", where=f"group mean of {name}", expected="finite scores", got=values)
    # Division after fsum may miss the common value of equal scores by one unit in the last place.
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)
