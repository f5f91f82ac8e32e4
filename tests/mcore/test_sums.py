"""Statistics of an update do not depend on who measured what in which order."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

from megatron_rpp.mcore.sums import Sums, add, update_stats

PARTS = [
    Sums(1e16, 1, 2, {"policy_loss": 1.0, "ratio_max": 1.5, "entropy": 4.0}),
    Sums(1.0, 1, 1, {"policy_loss": 2.0, "ratio_max": 7.0, "entropy": 1.0}),
    Sums(-1e16, 2, 2, {"policy_loss": 3.0, "ratio_max": 0.5, "entropy": 0.0}),
    Sums(),
]
DONE = [SimpleNamespace(grad_norm=1.0, lr=0.1, is_finite=True), SimpleNamespace(grad_norm=3.0, lr=0.2, is_finite=True)]


def test_sums_have_the_same_bits_in_every_order() -> None:
    assert {add(order).loss for order in itertools.permutations(PARTS)} == {1.0}
    both = add([add(PARTS[:2]), add(PARTS[1:2])])
    assert (both.denominator, both.num_tokens) == (3, 4)


def test_the_loss_is_over_its_denominator_means_are_over_tokens_and_maxima_are_maxima() -> None:
    """Of parts of unequal size, where means of means would be others: policy_loss (0.5 + 2 + 1.5) / 3, and not 6 / 5."""
    stats = update_stats(PARTS, DONE)
    assert (stats.loss, stats.policy_loss, stats.kl_loss, stats.num_tokens) == (0.25, 1.2, 0.0, 5)
    assert stats.values == {"ratio_max": 7.0, "entropy": 1.0, "lr": 0.2}
    assert (stats.grad_norm, stats.num_minibatches, stats.is_finite) == (2.0, 2, True)


def test_infinities_of_both_signs_are_reported_not_raised() -> None:
    stats = update_stats([Sums(math.inf, 1, 1), Sums(-math.inf, 1, 1)], DONE)
    assert math.isnan(stats.loss) and not stats.is_finite


def test_an_update_without_tokens_divides_by_nothing() -> None:
    stats = update_stats([Sums(0.0, 0, 0, {"entropy": 0.0})], DONE)
    assert (stats.loss, stats.values["entropy"], stats.num_tokens) == (0.0, 0.0, 0)


def test_an_update_without_a_step_is_finite_and_has_no_rate() -> None:
    stats = update_stats([], [])
    assert (stats.loss, stats.grad_norm, stats.num_minibatches, stats.is_finite, stats.values) == (0.0, 0.0, 0, True, {})
