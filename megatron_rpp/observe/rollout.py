"""What one roll-out looked like, from its groups alone: the same numbers on every rank and for every layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from megatron_rpp.types import Group

SOLVED = 1.0  # a score from here on counts as a solved problem


def rollout_metrics(groups: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    """Scores and lengths of all responses of a step, and the size of what it trains on. Sums are exactly rounded, in any order.

    groups: all that were sampled; kept: those that are trained on.
    Units: names say; *_frac are fractions of responses, even_groups_frac of prompts with scores to compare (0 where there are none).
    """
    kept_lengths = [len(response.tokens) for group in kept for response in group.responses]
    responses = [response for group in groups for response in group.responses]
    count = len(responses)
    scores = [float(response.score) for response in responses]
    lengths = [len(response.tokens) for response in responses]
    mean = math.fsum(scores) / count
    compared = [group.is_even for group in groups if len(group.scores) > 1]
    metrics = {
        "score/mean": mean,
        "score/std": math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / count),
        "score/solved_frac": sum(score >= SOLVED for score in scores) / count,
        "score/even_groups_frac": sum(compared) / max(len(compared), 1),
        "score/failed_frac": sum(response.reward_failed is not None for response in responses) / count,
        "response/tokens_mean": sum(lengths) / count,
        "response/tokens_max": float(max(lengths)),
        "response/truncated_frac": sum(response.is_truncated for response in responses) / count,
        "batch/prompts": float(len(kept)),
        "batch/responses": float(len(kept_lengths)),
        "batch/response_tokens": float(sum(kept_lengths)),
        "batch/tokens": float(sum(kept_lengths) + sum(len(group.prompt.tokens) * len(group.responses) for group in kept)),
    }
    return metrics | _by_domain(groups)


def _by_domain(groups: Sequence[Group]) -> dict[str, float]:
    scores: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        scores[group.prompt.domain].extend(float(response.score) for response in group.responses)
    if len(scores) < 2:
        return {}
    return {f"score/domain/{domain}": math.fsum(values) / len(values) for domain, values in sorted(scores.items())}
