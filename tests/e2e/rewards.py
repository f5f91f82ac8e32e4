"""A reward that a random model gets partly right, by import path: reward.name=tests.e2e.rewards:digits."""

from __future__ import annotations

from megatron_rpp.reward.base import RewardInput


def digits(item: RewardInput) -> float:
    """The share of characters that are digits."""
    return sum(character.isdigit() for character in item.response) / max(len(item.response), 1)
