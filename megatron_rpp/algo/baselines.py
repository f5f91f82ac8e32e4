"""What a response's score is compared with. Scalar work on the scores of the whole roll-out batch, exact and order-free.

Means and deviations are the correctly rounded values of exact fractions, so neither the order of the responses nor a copy of the
whole batch shows in the bits. Groups go by id, never by position: OpenRLHF reshapes, and slime takes a batch of unequal groups for
one group (slime#1414). Equal scores are told by max == min: the computed deviation of eight float32 copies of 0.7 is not 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from megatron_rpp.errors import NumericsError


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of all responses of a step, equal on every rank.

    A group may be split over data-parallel ranks, so its mean cannot be had from one rank's batch.
    prompt_uids: group_S's values index it. lengths_S, is_truncated_S: tokens that the policy wrote, and whether the engine's
    limit ended them; for shaping. greedy_P: the score of the greedy response to each prompt, which group_S's values index; for
    remax. penalty_S: returns.kl_penalties of every response; for rloo with a KL coefficient.

    Shapes: [all responses] each: score_S float64, group_S int64, lengths_S int64, is_truncated_S bool, penalty_S float64;
    greedy_P [prompts] float64
    """

    score_S: Tensor
    group_S: Tensor
    prompt_uids: tuple[str, ...] = ()
    lengths_S: Tensor | None = None
    is_truncated_S: Tensor | None = None
    greedy_P: Tensor | None = None
    penalty_S: Tensor | None = None

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
    Equal scores have exactly their own value as the mean: a centred score of 0, not of 1e-17.

    min_size: the smallest group that has a baseline. A single response is its own mean and would teach nothing, silently.
    Shapes: group_S [S] int64, ids as in scores -> [S] float64 on group_S's device
    Raises: NumericsError for a group smaller than min_size, and for a score that is not finite, naming the prompt.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 6 (inclusive mean).
    """
    return _look_up(_members(scores, min_size), group_S, _mean)


def leave_one_out_baseline(scores: Scores, group_S: Tensor, score_S: Tensor) -> Tensor:
    """The mean score of the other responses to the same prompt.

    baseline[i] = (sum of scores.score_S[j] over the group - score_S[i]) / (k - 1), for a group of k
    score - baseline is k / (k - 1) times the score less the inclusive mean; it is exactly 0 where all scores are equal.

    score_S: the asked sequences' own scores, with the bits that they have in `scores`.
    Shapes: group_S, score_S [S] -> [S] float64 on group_S's device
    Raises: NumericsError for a group of one, for a score that is not finite, and for an own score that its group lacks.
    Source: RLOO arXiv 2402.14740 Eq. 8. Over samples; AReaL's mean_leave1out leaves out one token.
    """
    members, known = _members(scores, 2), {}
    total_of = {group: sum(map(Fraction, members[group])) for group in set(group_S.tolist())}
    asked = list(zip(group_S.tolist(), score_S.double().tolist(), strict=True))
    for group, own in asked:
        values = members[group]
        if own not in values:
            name = f"leave-one-out mean of {scores.name_of(group)}"
            raise NumericsError("a score is not among those of its group", where=name, expected=values, got=own)
        if (group, own) not in known:
            others = (total_of[group] - Fraction(own)) / (len(values) - 1)
            known[group, own] = own if min(values) == max(values) else float(others)
    return torch.tensor([known[key] for key in asked], dtype=torch.float64, device=group_S.device)


def group_std(scores: Scores, group_S: Tensor, *, unbiased: bool) -> Tensor:
    """The standard deviation of each asked sequence's group; exactly 0 where all its scores are equal.

    unbiased: n - 1 in place of n.
    Shapes: group_S [S] int64 -> [S] float64 on group_S's device
    Raises: NumericsError for a group of one, and for a score that is not finite, naming the prompt.
    Source: GRPO arXiv 2402.03300 section 4.1.2.
    """

    def deviation(values: Sequence[float]) -> float:
        if min(values) == max(values):
            return 0.0
        unit = 2.0 ** (math.frexp(max(map(abs, values)))[1] - 1)  # squares of what is beyond 1e154 are no floats
        exact = [Fraction(value) / Fraction(unit) for value in values]
        m2 = sum(value * value for value in exact) - sum(exact) ** 2 / len(exact)
        return unit * math.sqrt(m2 / (len(exact) - unbiased))

    return _look_up(_members(scores, 2), group_S, deviation)


def greedy_baseline(scores: Scores, group_S: Tensor) -> Tensor:
    """The score of the greedy response to each asked sequence's prompt.

    Shapes: group_S [S] int64 -> [S] float64 on group_S's device
    Raises: ValueError when the step has no greedy responses; NumericsError for a prompt whose greedy score is not finite.
    Source: ReMax arXiv 2310.10505 Algorithm 2.
    """
    if scores.greedy_P is None:
        raise ValueError("estimator remax needs the score of a greedy response to every prompt: Scores.greedy_P is missing")
    bad = scores.greedy_P.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            "the score of a greedy response is not finite",
            where=f"greedy baseline of {scores.name_of(bad[0])}",
            expected="a greedy response with a score to every prompt",
            got=scores.greedy_P[bad[0]].item(),
        )
    return scores.greedy_P.double().to(group_S.device)[group_S]


def zero_variance_frac(scores: Scores) -> float:
    """Of the prompts with more than one score, the greedy response's among them, the share whose scores are all equal; else 0.

    Shapes: -> scalar
    """
    members = _by_group(scores)
    if scores.greedy_P is not None:
        for group, values in members.items():
            values.append(float(scores.greedy_P[group]))
    compared = [max(values) == min(values) for values in members.values() if len(values) > 1]
    return sum(compared) / max(len(compared), 1)


def _by_group(scores: Scores) -> dict[int, list[float]]:
    members: dict[int, list[float]] = defaultdict(list)
    for group, score in zip(scores.group_S.tolist(), scores.score_S.tolist(), strict=True):
        members[group].append(score)
    return members


def _members(scores: Scores, min_size: int) -> dict[int, list[float]]:
    """The scores of every group. Every rank looks at all of them, so that every rank raises for the same group."""
    members = _by_group(scores)
    for group, values in members.items():
        _refuse(values, scores.name_of(group), min_size)
    return members


def _look_up(members: dict[int, list[float]], group_S: Tensor, function: Callable[[Sequence[float]], float]) -> Tensor:
    value_of = {group: function(values) for group, values in members.items()}
    return torch.tensor([value_of[group] for group in group_S.tolist()], dtype=torch.float64, device=group_S.device)


def _mean(values: Sequence[float]) -> float:
    return values[0] if min(values) == max(values) else float(sum(map(Fraction, values)) / len(values))


def _refuse(values: list[float], name: str, min_size: int) -> None:
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
