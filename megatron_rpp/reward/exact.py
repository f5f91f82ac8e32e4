"""Reward 1 for the same text, white space aside."""

from __future__ import annotations

from megatron_rpp.reward.base import RewardInput
from megatron_rpp.reward.thought import after_thought

ANSWER_MARKERS = ("####", "Answer:")


def after_marker(text: str) -> str:
    """What follows the last answer marker, or the whole text when it has none."""
    end = max((text.rfind(marker) + len(marker) for marker in ANSWER_MARKERS if marker in text), default=0)
    return text[end:]


def score(item: RewardInput) -> float:
    """1.0 if response and answer, each after its last marker, hold the same words in the same order; case counts.

    An empty response never scores. Thoughts are not looked at.
    """
    response, answer = after_marker(after_thought(item)).split(), after_marker(item.answer).split()
    return float(bool(response) and response == answer)
