"""A share of the mutated config.json files of fuzz_config_json.py: no traceback, no hang, one clean message each."""

from __future__ import annotations

from tests.unit.fuzz import run_module


def test_mutated_models_are_accepted_or_refused_in_one_message() -> None:
    summary = run_module("tests.unit.hf.fuzz_config_json", count=150, seed=5)
    assert summary["faults"] == []
    assert summary["count"] == 150
    assert min(summary["accepted"], summary["refused"]) >= 20  # the generator makes both
    assert summary["slowest_s"] < 10
