"""A share of the mutated settings of fuzz_settings.py: no traceback, no hang, one clean message each."""

from __future__ import annotations

from tests.unit.fuzz import run_module


def test_mutated_settings_are_accepted_or_refused_in_one_message() -> None:
    summary = run_module("tests.unit.config.fuzz_settings", count=250, seed=5)
    assert summary["faults"] == []
    assert summary["count"] == 250
    assert min(summary["accepted"], summary["refused"]) >= 5  # the generator makes both
    assert summary["slowest_s"] < 10
