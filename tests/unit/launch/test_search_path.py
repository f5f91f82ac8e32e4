"""Modules in the working directory: they replace none of Python's own, and a reward is still found there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp import search_path
from megatron_rpp.reward.base import RewardInput
from megatron_rpp.reward.pool import RewardPool
from tests.guards.source import PACKAGE

# Imported by torch, numpy, asyncio, subprocess, argparse and json themselves.
SHADOWS = ("numbers", "argparse", "difflib", "selectors", "decoder", "random", "socket", "struct", "tempfile", "secrets")
REWARD = "def score(item):\n    return 0.25\n"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's reward, and with modules named as Python's, each of which ends who imports it."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py of the working directory')\n")
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1", "response": "2", "answer": "2"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RPP = str(Path(sys.executable).with_name("rpp"))


@pytest.mark.parametrize("command", [("-m", "megatron_rpp"), ("-P", "-m", "megatron_rpp"), (RPP,)], ids=["-m", "-P -m", "rpp"])
def test_score_runs_with_a_reward_of_a_directory_that_shadows_the_standard_library(command: tuple[str, ...], hostile: Path) -> None:
    line = [sys.executable, *command, "score", "--input", "rows.jsonl", "--json", "--reward", "my_reward:score"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.25" in done.stdout


def test_a_pool_finds_the_reward_and_no_shadow(hostile: Path) -> None:
    with RewardPool("my_reward:score", num_workers=1) as pool:
        assert pool.score_many([RewardInput("1+1", "2", "2", {})])[0].score == 0.25


def test_python_is_started_only_without_the_working_directory() -> None:
    """By `python_module`, or with `-P` beside it."""
    started = {path: re.findall(r"\[sys\.executable, ([^,]+)", path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: options for path, options in started.items() if set(options) - {'"-P"'}} == {}
    assert sum(len(options) for options in started.values()) >= 2


def test_an_entry_that_the_user_chose_keeps_its_place(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "last"):
        (hostile / name).mkdir()
    hook = "__editable__.some_package-1.0.finder.__path_hook__"
    monkeypatch.setattr(sys, "path", ["first", str(hostile), "last", hook])
    assert search_path.with_working_directory() == [str(hostile / "first"), str(hostile), str(hostile / "last"), hook]
    monkeypatch.setattr(sys, "path", ["first"])
    assert search_path.with_working_directory() == [str(hostile / "first"), str(hostile)]
