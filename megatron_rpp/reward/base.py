"""What a reward is shown and what comes back. No torch here: verifier processes import this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal["timeout", "crash", "memory", "exception", "bad value", "protocol", "closed", "no worker"]


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One response to judge.

    prompt: the problem as written in the data file, before the chat template.
    response: what the model wrote.
    answer: the reference of the data file.
    prompt_end: what the chat template wrote after the last message; it may open a thought.
    """

    prompt: str
    response: str
    answer: str
    prompt_end: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score, or why there is none.

    reward_failed: None, or the kind of failure; score is then the configured stand-in and reason says what happened.
    """

    score: float
    reward_failed: FailureKind | None = None
    reason: str = ""


RewardFn = Callable[[RewardInput], float]
