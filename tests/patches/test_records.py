"""The registry, its table, its locks and its budget agree with each other and with what is installed."""

from __future__ import annotations

import ast
import datetime
import io
import re
import sys
from pathlib import Path

import pytest

import megatron_rpp_patches
from megatron_rpp_patches import Patch, __main__, _record
from megatron_rpp_patches._source import fingerprint

ROOT = Path(megatron_rpp_patches.__path__[0])
TESTS = Path(__file__).parents[1]
MEGATRON = __main__.all_patches(["megatron_core"])
ALL = __main__.all_patches(megatron_rpp_patches.set_names())
IDS = [patch.id for patch in ALL]


@pytest.mark.parametrize("patch", ALL, ids=IDS)
def test_a_record_says_all_that_is_needed_to_judge_it(patch: Patch) -> None:
    assert re.fullmatch(r"p\d{3}-[a-z0-9-]+", patch.id)
    assert len(patch.why) >= 20, patch.why
    assert re.match(r"not reported: \S|https://|[\w.-]+/[\w.-]+#\d+", patch.upstream), patch.upstream
    assert patch.remove_when
    assert not _record.version_matches(patch.versions, "999.0"), "a patch is reviewed for versions that exist"


@pytest.mark.parametrize("patch", ALL, ids=IDS)
def test_no_patch_has_outlived_its_date(patch: Patch) -> None:
    today = datetime.date.today()
    assert today <= patch.expires <= today + datetime.timedelta(days=2 * 366), f"look again at {patch.id}: {patch.remove_when}"


def test_ids_are_unique() -> None:
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("patch", ALL, ids=IDS)
def test_the_necessity_test_of_a_patch_exists(patch: Patch) -> None:
    file, _, name = patch.test.partition("::")
    function, _, case = name.partition("[")
    names = {node.name for node in ast.parse((TESTS.parent / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert function in names, patch.test
    if file.endswith("test_necessity.py"):
        from tests.patches.behaviours import CHECKS

        assert case.rstrip("]") == patch.id
        assert patch.id in CHECKS


def test_the_table_in_the_readme_is_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert __main__.main(["table"]) == 0
    assert (ROOT / "README.md").read_text(encoding="utf-8") == out.getvalue(), (
        "run: python -m megatron_rpp_patches table > patches/README.md"
    )


@pytest.mark.parametrize("library", sorted({patch.library for patch in ALL}))
def test_locks_match_the_installed_library_and_hold_nothing_else(library: str) -> None:
    version = _record.installed_version(library)
    if version is None:
        pytest.skip(f"{library} is not installed")
    locked = {patch.locked for patch in ALL if patch.library == library and patch.locked}
    if not locked:
        pytest.skip(f"no patch of {library} has a source to lock")
    assert _record.read_lock(library, version) == {name: fingerprint(name) for name in locked}


def test_status_says_that_everything_is_as_reviewed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = __main__.main(["status"]), capsys.readouterr().out
    assert code == 0, out
    assert [line.split()[0] for line in out.splitlines()] == IDS


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["aply"]) == 2
    assert "status | lock | table" in capsys.readouterr().err


def test_the_patches_of_megatron_stay_within_their_budget() -> None:
    """Not the six patches and 300 lines of the style guide: a library that names CUDA in 254 lines takes more.

    24 records are 14 concerns (the six collectives are one, so are the five names of the spec), each in one file.
    The spec modules are not patches but the layers that the patched names lead to.
    """
    files = sorted((ROOT / "megatron_core").glob("p0*.py"))
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert len(MEGATRON) <= 24, [patch.id for patch in MEGATRON]
    assert max(lines.values()) <= 140, lines
    assert sum(lines.values()) <= 820, lines
    assert sum(len(file.read_text().splitlines()) for file in (ROOT / "megatron_core" / "spec").glob("*.py")) <= 480
    assert sum(len(file.read_text().splitlines()) for file in ROOT.glob("_*.py")) <= 720


def test_the_machinery_imports_the_standard_library_and_our_errors_only() -> None:
    allowed = {*sys.stdlib_module_names, "megatron_rpp_patches", "megatron_rpp.errors"}
    for file in [*ROOT.glob("*.py"), *(ROOT / "megatron_core").glob("p0*.py"), ROOT / "megatron_core" / "_host.py"]:
        for node in ast.parse(file.read_text()).body:  # at the top level: a target is imported where it is used
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name in allowed or name.partition(".")[0] in allowed, f"{file.name}: {name}"
