"""tests/run.sh itself, on a made-up project: no tier can fail, vanish or be skipped without the last line telling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards.source import ROOT

PASSES = "def test_one_and_one_is_two():\n    assert 1 + 1 == 2\n"
FAILS = "def test_one_and_one_is_three():\n    assert 1 + 1 == 3\n"
SKIPS = "import pytest\n\n@pytest.mark.skip(reason='no device')\ndef test_with_a_device():\n    pass\n"
BREAKS = "import nowhere_to_be_found\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the script under test, an environment that is ready, and no tests yet."""
    for name in ("tests/run.sh", "tests/conftest.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (("tools/bootstrap.sh", "exit 0"), (".venv/bin/python", f'exec {sys.executable} "$@"')):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return tmp_path


def run(project: Path, *arguments: str, ci: bool = False, **tiers: str) -> tuple[int, list[str]]:
    for tier, text in tiers.items():
        (project / "tests" / tier).mkdir(exist_ok=True)
        (project / "tests" / tier / "test_it.py").write_text(text)
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "RPP_VENV") and not name.startswith("PYTEST")}
    env |= {"CI": "true"} if ci else {}
    command = ["bash", str(project / "tests" / "run.sh"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return result.returncode, result.stdout.splitlines()


def test_named_tiers_are_counted_and_end_in_one_line(project: Path) -> None:
    code, lines = run(project, "unit", "dist", unit=PASSES + FAILS.replace("3", "2").replace("three", "two_again"), dist=PASSES)
    assert (code, lines[-1]) == (0, "3 passed, 0 failed")
    assert [line.split()[:2] for line in lines[-4:-2]] == [["unit", "2"], ["dist", "1"]]


def test_a_failure_in_an_early_tier_does_not_stop_later_ones(project: Path) -> None:
    code, lines = run(project, "unit", "dist", unit=PASSES + FAILS, dist=PASSES)
    assert (code, lines[-1]) == (1, "2 passed, 1 failed")


@pytest.mark.parametrize(
    ("tiers", "last"),
    [
        ({"unit": PASSES, "dist": ""}, "1 passed, 1 failed"),  # collects nothing
        ({"unit": PASSES}, "1 passed, 1 failed"),  # has no folder
        ({"unit": PASSES, "dist": BREAKS}, "1 passed, 1 failed"),  # cannot be imported
        ({"unit": PASSES, "dist": "import os\nos._exit(7)\n"}, "1 passed, 1 failed"),  # takes pytest with it
    ],
    ids=["empty", "missing", "broken", "crashing"],
)
def test_a_tier_without_a_result_has_failed(project: Path, tiers: dict[str, str], last: str) -> None:
    code, lines = run(project, "unit", "dist", **tiers)
    assert (code, lines[-1]) == (1, last)


def test_a_tier_that_only_skips_is_told_and_fails_in_ci(project: Path) -> None:
    code, lines = run(project, "unit", "slurm", unit=PASSES, slurm=SKIPS)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")
    code, lines = run(project, "unit", "slurm", ci=True)
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 1 skipped")
    assert "only skipped, in CI" in lines[-3]


def test_words_after_two_dashes_go_to_pytest(project: Path) -> None:
    code, lines = run(project, "unit", "--", "-k", "two", unit=PASSES + FAILS)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed")


def test_an_unknown_tier_is_refused_before_anything_runs(project: Path) -> None:
    assert run(project, "unit", "integration", unit=PASSES) == (2, [])
