"""Every patch of Megatron-Core does what it is for, and nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patches.behaviours import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, str]]:
    """What each check raised with and without its patch, in a process where nothing else has been imported."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.patches.behaviours"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_with_the_patch(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    assert outcomes[name][0] == ""


@pytest.mark.parametrize("name", CHECKS)
def test_without_the_patch(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    assert outcomes[name][1] != "", f"nothing fails without it any more: delete {name}"
