"""What goes to an engine and what comes back, in plain values."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from megatron_rpp.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy, and its log-probabilities are those of temperature 1.

    stop_token_ids end a response besides the model's own end tokens, and are part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    stop_token_ids: tuple[int, ...] = ()

    def to_sglang(self, seed: int) -> dict[str, object]:
        """SGLang's sampling parameters of one request."""
        return {
            "max_new_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop_token_ids": list(self.stop_token_ids) or None,
            "sampling_seed": seed,
        }


def greedy(sampling: Sampling) -> Sampling:
    """The most probable token at every place, within the same limits."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1)


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample. key: names it in the completion and in errors, unique among those in flight."""

    key: str
    tokens: tuple[int, ...]
    seed: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. logp: of each token at the sampling temperature, before top-p and top-k cut anything off."""

    key: str
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: FinishReason
    version: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine said of itself when it started. is_seeded: equal seeds give equal tokens, whatever else is in the batch."""

    pid: int
    reports: tuple[dict[str, Any], ...]  # one for each process: pid, role, rank, patches
    is_seeded: bool
    start_s: float


@dataclass(frozen=True, slots=True)
class EngineBeat:
    """The last sign of life. quiet_s: how long SGLang's workers had sent nothing; in_flight: as the server counts."""

    received: float
    in_flight: int
    quiet_s: float

    def describe(self) -> str:
        age_s = time.monotonic() - self.received
        return f"last beat {age_s:.1f} s ago: {self.in_flight} requests in flight, workers quiet for {self.quiet_s:.1f} s"
