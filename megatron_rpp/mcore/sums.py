"""Statistics of an update: sums over one rank's micro-batches, then means over all ranks. Pure; knows nothing of megatron."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_rpp.algo.objective import MAX_SUFFIX
from megatron_rpp.types import UpdateStats

if TYPE_CHECKING:
    from megatron_rpp.mcore.optimizer import StepResult


@dataclass(frozen=True, slots=True)
class Sums:
    """What an objective measured on some tokens: sums, or the maximum where a name ends in _max. Nothing off the last stage.

    denominator: what the loss is divided by, tokens or responses as the objective counts them. num_tokens: masked tokens, what
    everything else is divided by.
    """

    loss: float = 0.0
    denominator: int = 0
    num_tokens: int = 0
    values: dict[str, float] = field(default_factory=dict)


def add(parts: Iterable[Sums]) -> Sums:
    """Several into one. Sums are rounded once (fsum), so their order, and with it the layout of dp, does not show."""
    parts = list(parts)
    columns: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.values.items():
            columns.setdefault(name, []).append(value)
    values = {name: max(column) if name.endswith(MAX_SUFFIX) else _sum(column) for name, column in columns.items()}
    denominator, num_tokens = sum(part.denominator for part in parts), sum(part.num_tokens for part in parts)
    return Sums(_sum([part.loss for part in parts]), denominator, num_tokens, values)


def update_stats(parts: Iterable[Sums], results: Sequence[StepResult]) -> UpdateStats:
    """Means over the tokens of an update, from the sums of all its minibatches on all data-parallel ranks.

    loss = sum / sum of denominators;  any other value = sum / number of tokens;  for a name that ends in _max, the maximum;
    lr is that of the last step, and absent without one. Minibatches of unequal size are weighed by it: nothing is a mean of means.
    """
    total = add(parts)
    tokens = max(total.num_tokens, 1)
    values = {name: value if name.endswith(MAX_SUFFIX) else value / tokens for name, value in total.values.items()}
    return UpdateStats(
        loss=total.loss / max(total.denominator, 1),
        policy_loss=values.pop("policy_loss", 0.0),
        kl_loss=values.pop("kl_loss", 0.0),
        grad_norm=_sum([result.grad_norm for result in results]) / max(len(results), 1),
        num_minibatches=len(results),
        num_tokens=total.num_tokens,
        is_finite=all(result.is_finite for result in results) and math.isfinite(total.loss),
        values=values | ({"lr": results[-1].lr} if results else {}),
    )


def _sum(values: Sequence[float]) -> float:
    """fsum, which raises on infinities of both signs, where plain addition says nan."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
