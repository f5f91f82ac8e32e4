"""The part of a response that is judged: what follows the thought."""

from __future__ import annotations

from megatron_rpp.reward.base import RewardInput

OPEN, CLOSE = "<think>", "</think>"


def after_thought(item: RewardInput) -> str:
    """What follows the last closed thought; the whole response if it has none; nothing if a thought is still open.

    A chat template may open the thought at the end of the prompt; `prompt_end` shows that.
    """
    end = item.prompt_end
    is_open = end.rfind(OPEN) > end.rfind(CLOSE)
    _, closed, answer = item.response.rpartition(CLOSE)
    if OPEN in answer or (is_open and not closed):
        return ""
    return answer
