"""REINFORCE++ by loops over lists, written from the paper (arXiv 2501.03262) with no tensor and no cleverness.

A response is a list of tokens; a token is (is_masked, logp_old, logp_ref).
"""

from __future__ import annotations

import math

Token = tuple[bool, float, float]


def returns(tokens: list[Token], score: float, *, beta: float, gamma: float) -> list[float]:
    """Eq. 4 with a discount, from the last token backwards; tokens outside the mask are skipped as if they were not there."""
    result = [0.0] * len(tokens)
    following, is_last = 0.0, True
    for t in reversed(range(len(tokens))):
        is_masked, logp_old, logp_ref = tokens[t]
        if is_masked:
            following = (score if is_last else 0.0) - beta * (logp_old - logp_ref) + (0.0 if is_last else gamma * following)
            result[t], is_last = following, False
    return result


def centred(scores: list[float], groups: list[int]) -> list[float]:
    """Eq. 6: each score less the mean of its group."""
    result = []
    for score, group in zip(scores, groups, strict=True):
        members = [other for other, its_group in zip(scores, groups, strict=True) if its_group == group]
        result.append(score - sum(members) / len(members))
    return result


def normalised(
    values: list[list[float]], masks: list[list[bool]], *, population: str = "token", recentre: bool = True
) -> list[list[float]]:
    """Eq. 5: over all masked tokens of all responses, each token counting 1 or each response counting 1."""
    weighted = []
    for row, mask in zip(values, masks, strict=True):
        kept = [value for value, is_masked in zip(row, mask, strict=True) if is_masked]
        weighted += [(value, 1.0 if population == "token" else 1.0 / len(kept)) for value in kept]
    total = math.fsum(weight for _, weight in weighted)
    mean = math.fsum(weight * value for value, weight in weighted) / total
    variance = math.fsum(weight * (value - mean) ** 2 for value, weight in weighted) / total
    deviation = math.sqrt(max(variance, 1e-8))
    return [
        [(value - (mean if recentre else 0.0)) / deviation if is_masked else 0.0 for value, is_masked in zip(row, mask, strict=True)]
        for row, mask in zip(values, masks, strict=True)
    ]


def advantages(
    responses: list[list[Token]],
    scores: list[float],
    groups: list[int],
    *,
    baseline: bool,
    beta: float = 0.0,
    gamma: float = 1.0,
    clip: tuple[float, float] | None = None,
    population: str = "token",
    recentre: bool = True,
) -> list[list[float]]:
    """The two variants of section 3.2: clip, centre, place on the last token, penalise, sum, normalise."""
    if clip is not None:
        scores = [min(max(score, clip[0]), clip[1]) for score in scores]
    if baseline:
        scores = centred(scores, groups)
    raw = [returns(tokens, score, beta=beta, gamma=gamma) for tokens, score in zip(responses, scores, strict=True)]
    return normalised(raw, [[token[0] for token in tokens] for tokens in responses], population=population, recentre=recentre)


def clipped_loss(logp_new: float, logp_old: float, adv: float, *, low: float, high: float, dual: float | None = None) -> float:
    """PPO Eq. 7 for one token, as a min of two terms."""
    ratio = math.exp(logp_new - logp_old)
    held = min(max(ratio, 1 - low), 1 + high)
    gain = min(ratio * adv, held * adv)
    return -(max(gain, dual * adv) if dual is not None and adv < 0 else gain)
