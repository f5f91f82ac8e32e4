"""Which numbers a setting may hold, whatever the other settings say. Rules between settings are in validate.py.

A flag of a command or tool takes the range of the setting that it stands for, and refuses a number in the same words.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rpp.errors import ConfigError

# Waits are counted in milliseconds by poll() and by the libraries that call it: 0 means no limit to some of them, and the
# largest C int is 24 days.
MIN_SECONDS, MAX_SECONDS = 0.001, 14 * 86_400
# Verifiers are processes, two each, and an engine's leader starts all of them at once. More than the largest hosts have cores.
MAX_WORKERS = 1024


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from `low` to `high`. words: the range as a reader says it, after "must be"."""

    words: str
    low: float
    high: float | None = None
    without_low: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value) and self.high is None:
            return f"must be a finite number, got {value}"
        is_above_low = value > self.low or (value == self.low and not self.without_low)
        if not is_above_low or (self.high is not None and value > self.high):  # NaN is not above anything
            return f"must be {self.words}, got {_shown(value)}"
        return None


AT_LEAST_1 = Range("at least 1", 1)
AT_LEAST_0 = Range("0 or more", 0)
ABOVE_0 = Range("more than 0", 0, without_low=True)
SECONDS = Range(f"from {MIN_SECONDS} to {MAX_SECONDS} seconds (14 days)", MIN_SECONDS, MAX_SECONDS)
WORKERS = Range(f"from 1 to {MAX_WORKERS}", 1, MAX_WORKERS)

COUNTS = (
    *("run.steps", "run.max_empty_steps"),
    *("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.dp", "parallel.ep", "parallel.etp"),
    *("rollout.tp", "rollout.engines", "rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.max_response_tokens"),
    *("rollout.max_concurrent", "weights.bucket_mib", "algo.minibatches", "algo.aggregate_tokens", "algo.kl_horizon", "stats.limbs"),
    *("optim.microbatch_tokens", "checkpoint.keep", "eval.max_prompts", "eval.max_response_tokens", "sft.batch_sequences"),
    "data.max_prompt_tokens",
)
_NOT_NEGATIVE = (
    *("run.seed", "algo.kl_reward_coef", "algo.kl_loss_coef", "algo.entropy_coef", "algo.grpo_std_eps", "reward.overlong_penalty"),
    *("rollout.max_refills", "critic.lr", "critic.warmup_steps", "optim.lr", "optim.min_lr", "optim.warmup_steps"),
    *("optim.weight_decay", "optim.clip_grad", "checkpoint.every", "eval.every", "eval.temperature"),
    *("sft.steps", "sft.lr", "sft.warmup_steps"),
)
_POSITIVE = (
    *("rollout.temperature", "optim.eps", "observe.mismatch_alarm", "algo.gae_length_alpha", "algo.kl_target", "critic.value_clip"),
)
_RANGES = {
    **dict.fromkeys(COUNTS, AT_LEAST_1),
    **dict.fromkeys(_NOT_NEGATIVE, AT_LEAST_0),
    **dict.fromkeys(_POSITIVE, ABOVE_0),
    "reward.num_workers": WORKERS,
}


def range_of(setting: str) -> Range | None:
    """The range of a setting of that dotted name. The unit `_s` in a name is a range too: that of a time limit."""
    return SECONDS if setting.endswith("_s") else _RANGES.get(setting)


def check_range(setting: str, value: object) -> None:
    """Raises: ConfigError for a value outside the range of the setting."""
    if (problem := range_of(setting).problem(value)) is not None:
        raise ConfigError(problem, where=setting)


def flag_type(setting: str, kind: type[int] | type[float]) -> Callable[[str], float]:
    """What argparse needs as `type` of a flag that stands for that setting."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number, got {text[:60]!r}") from None
        if (problem := range_of(setting).problem(value)) is not None:
            raise argparse.ArgumentTypeError(problem)
        return value

    return read


def _shown(value: float) -> str:
    """The value, however many digits it has."""
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else f"a number of {value.bit_length()} bits"
