"""Every estimator by loops over lists, written from the papers with no tensor, no recursion and no cleverness.

A response is the list of its written tokens; what lies between them does not exist here. Sums are math.fsum of every single term,
means and deviations of scores exact fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

from megatron_rpp.config.schema import Algo
from tests.reference.cases import Row, Rows


def raw(rows: Rows, algo: Algo, greedy: Sequence[float] = ()) -> list[list[float]]:
    """The advantage of every written token, by row, before any normalisation."""
    return [_raw_row(i, rows, algo, greedy) for i in range(len(rows))]


def _raw_row(i: int, rows: Rows, algo: Algo, greedy: Sequence[float]) -> list[float]:
    row, group = rows[i], [other for other in rows if other.group == rows[i].group]
    score, scores = clipped(row, algo), [clipped(other, algo) for other in group]
    kl = penalties(row, algo)
    match algo.estimator:
        case "reinforce_pp":  # arXiv 2501.03262 Eq. 4
            return to_go(score, kl, algo.gamma)
        case "reinforce_pp_baseline" | "dr_grpo":  # arXiv 2501.03262 Eq. 6; arXiv 2503.20783 Eq. 3
            return to_go(float(Fraction(score) - mean(scores)), kl, algo.gamma)
        case "grpo":  # arXiv 2402.03300 section 4.1.2
            among = [clipped(other, algo) for other in rows] if algo.grpo_std == "batch" else scores
            away = Fraction(score) - mean(scores)
            unit = deviation(tuple(among), unbiased=algo.grpo_std_unbiased) + algo.grpo_std_eps
            return to_go(float(away) / unit if away else 0.0, kl, algo.gamma)
        case "rloo":  # arXiv 2402.14740 Eq. 8, with R = r - beta * log(pi / pi_ref) of the whole response
            others = [other for j, other in enumerate(rows) if j != i and other.group == row.group]
            less_kl = [clipped(other, algo) - math.fsum(penalties(other, algo)) for other in others]
            return to_go(score - math.fsum(kl) - math.fsum(less_kl) / len(less_kl), [0.0] * len(kl), algo.gamma)
        case "remax":  # arXiv 2310.10505 Algorithm 2
            return [value - clip(greedy[row.group], algo) for value in to_go(score, kl, algo.gamma)]
        case "gae":
            return generalised(row, score, kl, algo)
    raise AssertionError(algo.estimator)


def to_go(score: float, penalty: Sequence[float], gamma: float) -> list[float]:
    """sum over s >= t of gamma^(s - t) * reward[s]: every term of every sum."""
    n = len(penalty)
    reward = [(score if s == n - 1 else 0.0) - penalty[s] for s in range(n)]
    return [math.fsum(gamma ** (s - t) * reward[s] for s in range(t, n)) for t in range(n)]


def generalised(row: Row, score: float, penalty: Sequence[float], algo: Algo) -> list[float]:
    """arXiv 1506.02438 Eq. 16 with the policy's lambda."""
    n = len(penalty)
    lam = algo.gae_lambda if algo.gae_length_alpha is None else max(0.0, 1 - 1 / (algo.gae_length_alpha * n)) if n else 0.0
    return estimated(row, score, penalty, algo.gamma, lam)


def critic_targets(rows: Rows, algo: Algo, lam: float | None) -> list[list[float]]:
    """arXiv 2504.05118 section 4.1: what each written token's value should become, with a lambda of the critic's own.

    lam: None takes the policy's, or 1 where that follows the length.
    """
    own = (algo.gae_lambda if algo.gae_length_alpha is None else 1.0) if lam is None else lam
    found = []
    for row in rows:
        advantages = estimated(row, clipped(row, algo), penalties(row, algo), algo.gamma, own)
        found.append([adv + value for adv, value in zip(advantages, written(row, row.value), strict=True)])
    return found


def estimated(row: Row, score: float, penalty: Sequence[float], gamma: float, lam: float) -> list[float]:
    """arXiv 1506.02438 Eq. 16: sum over l of (gamma * lambda)^l * delta[t + l]."""
    value = [*written(row, row.value), 0.0]
    n = len(penalty)
    delta = [(score if s == n - 1 else 0.0) - penalty[s] + gamma * value[s + 1] - value[s] for s in range(n)]
    return [math.fsum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


def penalties(row: Row, algo: Algo) -> list[float]:
    """beta times the divergence at each written token (Schulman 2020)."""
    result = []
    for old, ref in zip(written(row, row.old), written(row, row.ref), strict=True):
        x = old - ref
        result.append(algo.kl_reward_coef * {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[algo.kl_reward])
    return result


def written(row: Row, values: Sequence[float]) -> list[float]:
    return [value for value, flag in zip(values, row.mask, strict=True) if flag]


def clip(score: float, algo: Algo) -> float:
    return score if algo.reward_clip is None else min(max(score, algo.reward_clip[0]), algo.reward_clip[1])


def clipped(row: Row, algo: Algo) -> float:
    return clip(row.score, algo)


def mean(values: Sequence[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction(0)) / len(values)


@cache  # of a whole batch it is asked once for every response
def deviation(values: tuple[float, ...], *, unbiased: bool) -> float:
    centre = mean(values)
    return math.sqrt(sum((Fraction(value) - centre) ** 2 for value in values) / (len(values) - unbiased))


def value_loss(new: float, old: float, target: float, clip_at: float | None) -> float:
    """ppo2 of openai/baselines: the larger of two squares, halved."""
    squares = [(new - target) ** 2]
    if clip_at is not None:
        squares.append((min(max(new, old - clip_at), old + clip_at) - target) ** 2)
    return max(squares) / 2


def overlong(length: int, *, max_tokens: int, cache: int, factor: float) -> float:
    """arXiv 2503.14476 Eq. 13, the sign turned: what is subtracted."""
    if length <= max_tokens - cache:
        return 0.0
    return factor * (length - (max_tokens - cache)) / cache if length <= max_tokens else factor


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's, in two passes; 0 where one side does not vary."""
    x, y = ([pair[i] for pair in pairs] for i in (0, 1))
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    dx, dy = ([value - math.fsum(side) / len(side) for value in side] for side in (x, y))
    return math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))
