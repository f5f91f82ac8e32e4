"""Losses, corrections and aggregation by loops over tokens, written from the papers with no tensor and no cleverness.

What an update holds fixed (a detached weight or ratio) is computed from `held` instead of `new`, so that a central difference in
`new` alone is the gradient that the papers mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rpp.config.schema import Algo, Correction


@dataclass(frozen=True)
class Token:
    """One token of a response; what it holds means something where is_masked only. held: None stands for new."""

    is_masked: bool
    new: float = 0.0
    old: float = 0.0
    ref: float = 0.0
    rollout: float = 0.0
    entropy: float = 0.0
    adv: float = 0.0
    weight: float = 1.0
    held: float | None = None

    @property
    def fixed(self) -> float:
        return self.new if self.held is None else self.held


Response = list[Token]


@dataclass(frozen=True)
class Kind:
    """The section `correction` in its old names."""

    kind: str = "none"
    level: str = "token"
    low: float = 0.0
    high: float = 2.0
    veto: float | None = None


def objective(responses: list[Response], algo: Algo) -> float:
    """The number that an optimiser step minimises, over all its responses."""
    rows = []
    for response in responses:
        written = [token for token in response if token.is_masked]
        row = []
        for token in written:
            loss = token.weight * policy_loss(token, written, algo)
            loss += algo.kl_loss_coef * kl_loss(token, algo.kl_loss) if algo.kl_loss_coef else 0.0
            row.append(loss - algo.entropy_coef * token.entropy)
        rows.append(row)
    return aggregated(rows, algo.aggregate, algo.aggregate_tokens)


def aggregated(rows: list[list[float]], name: str, num_tokens: int | None) -> float:
    """One number of the losses of all responses' tokens; a response without a token is an empty list."""
    full = [row for row in rows if row]
    if not full:
        return 0.0
    if name == "token_mean":
        values = [value for row in rows for value in row]
        return math.fsum(values) / len(values)
    if name == "seq_mean_token_mean":
        return math.fsum(math.fsum(row) / len(row) for row in full) / len(full)
    if name == "seq_mean_token_sum":
        return math.fsum(math.fsum(row) for row in full) / len(full)
    return math.fsum(math.fsum(row) / num_tokens for row in rows) / len(rows)


def policy_loss(token: Token, response: Response, algo: Algo) -> float:
    """One token's loss. response: the masked tokens that it stands among."""
    if algo.loss == "reinforce":
        return -token.adv * token.new
    if algo.loss == "cispo":
        return -_clip(ratio(token.fixed, token.old), algo) * token.adv * token.new
    if algo.loss == "gspo":
        mean = math.fsum(_bounded(other.fixed - other.old) for other in response) / len(response)
        value = math.exp(mean + _bounded(token.new - token.old) - _bounded(token.fixed - token.old))
    else:
        value = ratio(token.new, token.old)
    gain = min(value * token.adv, _clip(value, algo) * token.adv)
    if algo.dual_clip is not None and token.adv < 0:
        gain = max(gain, algo.dual_clip * token.adv)
    return -gain


def sequence_form(response: Response, algo: Algo) -> float:
    """GSPO Eq. 5 for one response: its ratio with the gradient of all its tokens, and the advantage that they share."""
    value = math.exp(math.fsum(token.new - token.old for token in response) / len(response))
    return -min(value * response[0].adv, _clip(value, algo) * response[0].adv)


def kl_loss(token: Token, name: str) -> float:
    x = token.new - token.ref
    value = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[name[:2]]
    if name.endswith("_unbiased"):
        value *= ratio(token.fixed if name.startswith("k2") else token.new, token.old)
    return value


def ratio(new: float, old: float) -> float:
    return math.exp(_bounded(new - old))


def is_near_a_kink(responses: list[Response], algo: Algo, margin: float = 1e-4) -> bool:
    """True when some ratio is next to a bound, or an advantage next to 0, where a loss has no derivative."""
    bounds = [1 - algo.clip_low, 1 + algo.clip_high, *([algo.dual_clip] if algo.dual_clip else [])]
    for response in responses:
        written = [token for token in response if token.is_masked]
        for token in written:
            value = ratio(token.new, token.old)
            if algo.loss == "gspo":
                value = math.exp(math.fsum(_bounded(other.new - other.old) for other in written) / len(written))
            if any(abs(value - bound) < margin for bound in bounds) or abs(abs(token.new - token.old) - 20) < margin:
                return True
    return False


def gradient(responses: list[Response], algo: Algo, step: float = 1e-6) -> list[list[float]]:
    """Central differences in each masked token's new log-probability, with what the update holds fixed held."""
    held = [[replace(token, held=token.fixed) for token in response] for response in responses]
    result = [[0.0] * len(response) for response in responses]
    for i, response in enumerate(held):
        for t, token in enumerate(response):
            if token.is_masked:
                values = []
                for sign in (1, -1):
                    response[t] = replace(token, new=token.new + sign * step)
                    values.append(objective(held, algo))
                response[t] = token
                result[i][t] = (values[0] - values[1]) / (2 * step)
    return result


def corrected(response: Response, rule: Correction) -> tuple[list[float], list[bool], list[bool]]:
    """By token of one response: its weight before any normalization, whether it stays in the loss mask, and whether it is kept."""
    gaps = [token.old - token.rollout for token in response if token.is_masked]
    is_rejected_whole = rule.veto is not None and not all(math.isfinite(gap) and math.exp(max(gap, -700.0)) >= rule.veto for gap in gaps)
    weights, in_mask, kept = [], [], []
    for token in response:
        if not token.is_masked:
            weights.append(0.0)
            in_mask.append(False)
            kept.append(False)
            continue
        is_kept, weight = not is_rejected_whole, 1.0
        if rule.reject != "none":
            seen = ratio_at(rule.reject, token, gaps)
            is_kept = is_kept and seen is not None and rule.reject_outside[0] <= seen <= rule.reject_outside[1]
        if rule.weight != "none":
            seen = ratio_at(rule.weight, token, gaps)
            is_kept = is_kept and seen is not None
            weight = seen if seen is not None else 0.0
            if rule.weight_clip is not None:
                weight = min(max(weight, rule.weight_clip[0]), rule.weight_clip[1])
        may_leave = rule.reject_mode == "mask" and (rule.reject != "none" or rule.veto is not None)
        weights.append(weight if is_kept else 0.0)
        in_mask.append(is_kept or not may_leave)
        kept.append(is_kept)
    return weights, in_mask, kept


def ratio_at(level: str, token: Token, gaps: list[float]) -> float | None:
    """The ratio that a level looks at; None where a log-probability that it needs is no number."""
    looked_at = [token.old - token.rollout] if level == "token" else gaps
    if not all(map(math.isfinite, looked_at)):
        return None
    total = math.fsum(map(_bounded, looked_at))
    return math.exp(_bounded(total / len(looked_at) if level == "geometric" else total))


def corrected_batch(responses: list[Response], rule: Correction) -> tuple[list[list[float]], list[list[bool]]]:
    """Weights as the loss multiplies by them, normalized where the rule says so, and the loss mask, of all responses of a step."""
    found = [corrected(response, rule) for response in responses]
    weights = [row for row, _, _ in found]
    if rule.weight_normalize:
        left = [weight for row, _, kept in found for weight, is_kept in zip(row, kept, strict=True) if is_kept]
        mean = math.fsum(left) / len(left) if left else 1.0
        weights = [[weight / mean for weight in row] for row in weights]
    return weights, [in_mask for _, in_mask, _ in found]


def corrected_by_kind(response: Response, correction: Kind) -> tuple[list[float], list[bool]]:
    """What the old names kind, level, low and high meant: the weight of each token of one response, and whether it stays in the mask."""
    if correction.kind == "none":
        return [float(token.is_masked) for token in response], [token.is_masked for token in response]
    gaps = [token.old - token.rollout for token in response if token.is_masked]
    weights, kept = [], []
    for token in response:
        if not token.is_masked:
            weights.append(0.0)
            kept.append(False)
            continue
        gap = token.old - token.rollout
        is_inside, judged = math.isfinite(gap), 0.0
        if correction.level != "token":
            is_inside = all(map(math.isfinite, gaps))
        if is_inside:
            total = math.fsum(_bounded(g) for g in gaps)
            judged = {"token": gap, "sequence": total, "geometric": total / len(gaps)}[correction.level]
            judged = math.exp(_bounded(judged))
        if correction.veto is not None:
            is_inside = is_inside and all(math.isfinite(g) and math.exp(max(g, -700.0)) >= correction.veto for g in gaps)
        if correction.kind == "tis":
            weight = min(max(judged, correction.low), correction.high)
        else:
            weight = math.exp(_bounded(gap)) if math.isfinite(gap) else 0.0
            is_inside = is_inside and correction.low <= judged <= correction.high
        weights.append(weight if is_inside else 0.0)
        kept.append(is_inside or correction.kind != "mis")
    return weights, kept


def _bounded(log_ratio: float) -> float:
    return min(max(log_ratio, -20.0), 20.0)


def _clip(value: float, algo: Algo) -> float:
    return min(max(value, 1 - algo.clip_low), 1 + algo.clip_high)
