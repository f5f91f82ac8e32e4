"""The list of everything that a run records, and the text form of a record.

A record is one JSON object on a line, with sorted names, so that two runs of the same seed write the same metrics.jsonl,
byte for byte. What the clock says is never among them: it has a file of its own, timings.jsonl.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Value = bool | int | float | str
Reduction = Literal["last", "mean", "min", "max", "sum"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One recorded quantity. over_steps: how a run's summary sums it up. A name that ends in `*` stands for a family."""

    name: str
    unit: str
    meaning: str
    over_steps: Reduction = "last"


METRICS = (
    Metric("score/mean", "score", "mean raw reward of the step's responses"),
    Metric("score/std", "score", "standard deviation of the raw reward over the step's responses"),
    Metric("score/solved_frac", "fraction", "responses with a score of 1 or more"),
    Metric(
        "score/even_groups_frac",
        "fraction",
        "prompts all of whose responses got the same score: no signal with the baseline estimator",
        "mean",
    ),
    Metric("score/failed_frac", "fraction", "responses whose verifier gave no score", "max"),
    Metric("score/domain/*", "score", "mean raw reward of one domain of prompts"),
    Metric("response/tokens_mean", "tokens", "mean length of a response"),
    Metric("response/tokens_max", "tokens", "longest response", "max"),
    Metric("response/truncated_frac", "fraction", "responses that the length limit ended", "mean"),
    Metric("batch/empty_steps", "steps", "1 where filtering left no token to learn from, else absent: no optimizer step", "sum"),
    Metric("batch/prompts", "prompts", "prompts of the step", "sum"),
    Metric("batch/responses", "responses", "responses of the step", "sum"),
    Metric("batch/response_tokens", "tokens", "tokens that the policy wrote", "sum"),
    Metric("batch/tokens", "tokens", "tokens that were trained on, prompts included", "sum"),
    Metric("adv/zero_variance_frac", "fraction", "prompts whose scores, where there are several, are all equal after shaping", "mean"),
    Metric("adv/is_degenerate", "", "1 when every advantage of the step is 0", "max"),
    Metric("adv/*", "", "what the advantage normalisation saw (return_*) and made: means, extremes, correlation with length"),
    Metric("correction/*", "", "the roll-out correction: mean weight, normalizer, effective sample size, what was kept, clipped, vetoed"),
    Metric("draw/*", "", "dynamic sampling: refills, groups kept"),
    Metric("critic/*", "", "the critic's update: loss, mean value and return, mean squared error"),
    Metric("policy/grad_norm", "", "gradient norm before clipping, mean over the optimiser steps", "max"),
    Metric("policy/clip_frac_low", "fraction", "tokens whose ratio fell below 1 - clip_low", "mean"),
    Metric("policy/clip_frac_high", "fraction", "tokens whose ratio rose above 1 + clip_high", "mean"),
    Metric("policy/ratio_max", "ratio", "largest probability ratio of new to old", "max"),
    Metric("policy/skipped_minibatches", "", "minibatches without a token to learn from: no optimiser step", "sum"),
    Metric("policy/*", "", "losses, divergences and rates of the update, token means over the step"),
    Metric("mismatch/mean_abs", "nats", "mean |logp_old - logp_rollout| over response tokens", "max"),
    Metric("mismatch/*", "", "further gaps between the training and the roll-out engine", "max"),
    Metric("eval/accuracy", "score", "mean score on the held-out prompts"),
    Metric("eval/*", "", "further facts of an evaluation"),
    Metric("sft/*", "", "supervised warm-up: loss and rates"),
)

_EXACT = {metric.name: metric for metric in METRICS if not metric.name.endswith("*")}
_FAMILIES = sorted((metric for metric in METRICS if metric.name.endswith("*")), key=lambda metric: -len(metric.name))


def metric(name: str) -> Metric:
    """What `name` stands for.

    Raises: ValueError for a name that is in nobody's list; it is a misspelling, or METRICS lacks a line.
    """
    if name in _EXACT:
        return _EXACT[name]
    for family in _FAMILIES:
        if name.startswith(family.name[:-1]) and len(name) >= len(family.name):
            return family
    close = difflib.get_close_matches(name, _EXACT, n=1)
    raise ValueError(f"metric {name!r} is not in observe.metrics.METRICS" + (f"; did you mean {close[0]!r}?" if close else ""))


def encode(kind: str, step: int, values: Mapping[str, Value]) -> str:
    """One record of metrics.jsonl.

    Values are plain Python numbers or words; one that is not finite is written as the word "nan", "inf" or "-inf", which
    JSON has no number for.
    Raises: ValueError for an unknown or misplaced name; TypeError for a value that is not plain (a tensor, a list).
    """
    for name in values:
        metric(name)
        if name.endswith("_s"):
            raise ValueError(f"metric {name!r} is a matter of the clock: pass it as timing")
    return _line(kind, step, values)


def encode_timing(kind: str, step: int, timing: Mapping[str, float]) -> str:
    """One record of timings.jsonl: seconds, and rates per second, to the microsecond.

    Raises: ValueError for a name that does not end in `_s`, which all of these do and no metric does.
    """
    stray = [name for name in timing if not name.endswith("_s")]
    if stray:
        raise ValueError(f"timing {stray[0]!r} must end in _s (seconds, or something per second)")
    return _line(kind, step, {name: round(value, 6) for name, value in timing.items()})


def _line(kind: str, step: int, values: Mapping[str, Value]) -> str:
    record = {"kind": kind, "step": step, **{name: _plain(name, values[name]) for name in sorted(values)}}
    return json.dumps(record, ensure_ascii=True, allow_nan=False)


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Value]:
    """One value for each recorded name over all steps, by the metric's `over_steps`."""
    seen: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("kind", "step"):
                seen.setdefault(name, []).append(value)
    return {name: _over_steps(metric(name).over_steps, values) for name, values in seen.items()}


def _over_steps(reduction: Reduction, values: list[Any]) -> Value:
    if reduction == "last" or any(isinstance(value, str) for value in values):
        return values[-1]
    if reduction == "mean":
        return math.fsum(values) / len(values)
    return {"min": min, "max": max, "sum": sum}[reduction](values)


def _plain(name: str, value: object) -> Value:
    if isinstance(value, bool | int | str):
        return value
    if not isinstance(value, float):
        raise TypeError(f"metric {name!r} must be a plain number or word, got {type(value).__name__}; call .item() where it is computed")
    if math.isfinite(value):
        return float(value)
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
