"""Rewards that a random model gets partly right, by import path: reward.name=tests.e2e.rewards:digits."""

from __future__ import annotations

from megatron_rpp.reward.base import RewardInput


def digits(item: RewardInput) -> float:
    """The share of characters that are digits."""
    return sum(character.isdigit() for character in item.response) / max(len(item.response), 1)


def digits_of_even_problems(item: RewardInput) -> float:
    """The same where the answer is even; a problem with an odd one has nothing to teach."""
    return 0.0 if int(item.answer) % 2 else digits(item)


def sees_the_assistants_turn(item: RewardInput) -> float:
    """1.0 when the verifier is shown what the quickstart's template writes after the last message."""
    return float(item.prompt_end == "<|assistant|>")
