"""Records: their bytes, their names, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_rpp.observe.metrics import METRICS, encode, encode_timing, metric, summarise


def test_a_record_is_these_bytes() -> None:
    line = encode("step", 3, {"score/mean": 0.1 + 0.2, "batch/tokens": 7, "policy/lr": 1e-6})
    assert line == '{"kind": "step", "step": 3, "batch/tokens": 7, "policy/lr": 1e-06, "score/mean": 0.30000000000000004}'
    assert encode_timing("step", 3, {"tokens_per_s": 12.34567891, "step_s": 2.0}) == (
        '{"kind": "step", "step": 3, "step_s": 2.0, "tokens_per_s": 12.345679}'
    )


def test_the_order_in_which_values_are_given_changes_nothing() -> None:
    values = {"score/mean": 0.5, "adv/min": -1.0}
    assert encode("step", 1, values) == encode("step", 1, dict(reversed(values.items())))


@pytest.mark.parametrize(
    ("value", "written"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf"), (True, True), ("word", "word")]
)
def test_every_value_is_valid_json(value: float, written: object) -> None:
    assert json.loads(encode("step", 1, {"score/mean": value}))["score/mean"] == written


@pytest.mark.parametrize("value", [torch.tensor(1.0), [1.0], None, {}])
def test_a_value_that_is_not_plain_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="'score/mean' must be a plain number or word"):
        encode("step", 1, {"score/mean": value})  # type: ignore[dict-item]


def test_an_unknown_name_is_refused_with_the_likely_one() -> None:
    with pytest.raises(ValueError, match=r"'score/maen' is not in .*; did you mean 'score/mean'\?"):
        encode("step", 1, {"score/maen": 1.0})


def test_what_the_clock_says_is_kept_apart() -> None:
    with pytest.raises(ValueError, match="pass it as timing"):
        encode("step", 1, {"policy/update_s": 1.0})
    with pytest.raises(ValueError, match="must end in _s"):
        encode_timing("step", 1, {"tokens": 1.0})


def test_a_name_belongs_to_its_own_line_before_any_family() -> None:
    assert metric("policy/grad_norm").over_steps == "max"
    assert metric("policy/entropy").name == "policy/*"
    assert metric("score/domain/algebra").name == "score/domain/*"
    with pytest.raises(ValueError, match="policy/"):
        metric("policy/")


def test_names_are_listed_once() -> None:
    names = [listed.name for listed in METRICS]
    assert sorted(set(names)) == sorted(names)
    assert all(listed.meaning for listed in METRICS)


def test_a_summary_reduces_each_name_over_the_steps_as_its_metric_says() -> None:
    steps = [
        {
            "kind": "step",
            "step": 1,
            "score/mean": 0.1,
            "policy/grad_norm": 5.0,
            "batch/tokens": 10,
            "response/truncated_frac": 0.0,
        },
        {"kind": "eval", "step": 1, "eval/accuracy": 0.3},
        {"kind": "step", "step": 2, "score/mean": 0.2, "policy/grad_norm": 1.0, "batch/tokens": 20, "response/truncated_frac": 0.5},
    ]
    assert summarise(steps) == {
        "score/mean": 0.2,
        "policy/grad_norm": 5.0,
        "batch/tokens": 30,
        "response/truncated_frac": 0.25,
        "eval/accuracy": 0.3,
    }
