"""What a verifier prints: seen by the user, obeyed by no terminal, and no way to block or flood a run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp.reward.base import RewardInput
from megatron_rpp.reward.output import MAX_LINES
from megatron_rpp.reward.pool import RewardPool

ITEM = RewardInput("prompt", "response", "answer")
VERIFIER = """
import os, subprocess, sys

print("\\x1b[2Jloaded \\u202e\\x9b31m")


def prints(item):
    print("\\x1b]0;owned\\x07out", flush=True)
    sys.stderr.write("warning: forged\\r\\x1b[31m\\n")
    os.write(2, b"\\xff no newline \\x08")
    subprocess.run(["printf", "\\\\033[5mchild\\\\n"])
    return 1.0


def floods(item):
    for _ in range(20):
        os.write(1, b"x" * 99 + b"\\n" + b"y\\n" * 10_000)
    os.write(2, b"z" * 300_000)
    return 0.5
"""


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], tuple[float, str, str]]:
    """score("function") -> its score, and what reached stdout and stderr."""
    (tmp_path / "verifier_that_prints.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(str(tmp_path))

    def score(name: str) -> tuple[float, str, str]:
        with RewardPool(f"verifier_that_prints:{name}", 20.0, 1) as pool:
            verdict = pool.submit(ITEM).result(timeout=60)
            assert verdict.reward_failed is None, verdict
        out, err = capfd.readouterr()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (more := capfd.readouterr()) != ("", ""):  # a thread shows what is still in the pipe
            out, err = out + more.out, err + more.err
            time.sleep(0.2)
        return verdict.score, out, err

    return score


def test_what_a_verifier_and_its_programs_print_is_shown_escaped_and_marked(score: Callable[[str], tuple[float, str, str]]) -> None:
    value, out, err = score("prints")
    assert (value, out) == (1.0, "")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", err)
    assert all(line.startswith("verifier: ") for line in err.splitlines())
    for shown in (
        r"\u001b[2Jloaded \u202e\u009b31m",
        r"\u001b]0;owned\u0007out",
        r"warning: forged\r\u001b[31m",
        "\ufffd no newline \\u0008",
    ):
        assert shown in err
    assert r"\u001b[5mchild" in err


def test_a_verifier_that_floods_is_read_and_not_shown_beyond_a_limit(score: Callable[[str], tuple[float, str, str]]) -> None:
    value, out, err = score("floods")
    assert (value, out) == (0.5, "")
    lines = err.splitlines()
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == f"verifier: {MAX_LINES} lines were shown; the others of this process are not"
