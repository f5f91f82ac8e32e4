"""Files that must agree with each other: settings, examples, pins, tiers, entry points."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from megatron_rpp.config.load import load
from megatron_rpp.config.load_decode import setting_names
from megatron_rpp.version import __version__
from tests.guards.source import ROOT, functions, name_of, python_files, text_files, tree_of

FIELDS = Path(__file__).with_name("config_fields.txt")
# A setting is a promise to every later version: growth beyond this wants another one to go. Twenty-three of them are the choices in
# which the estimators and corrections of the literature differ; a preset sets those, and few users will.
NUM_FIELDS = 124


def test_settings_are_those_on_the_list() -> None:
    """A change here changes what users may write. To accept it, put `setting_names()` on the list and a line into CHANGELOG.md."""
    names = list(setting_names())
    assert names == FIELDS.read_text().split()
    assert len(names) <= NUM_FIELDS


def test_the_schema_costs_nothing_to_import() -> None:
    code = "import sys; before = set(sys.modules); import megatron_rpp.config.schema; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {"megatron_rpp"}


@pytest.mark.parametrize("path", [path for path in text_files() if path.suffix == ".yaml" and "examples" in path.parts], ids=name_of)
def test_every_example_can_be_read(path: Path) -> None:
    load(path)


@pytest.mark.parametrize(
    "path", [path for path in text_files() if path.suffix in (".sh", ".sbatch") or path.parent.name == ".ci"], ids=name_of
)
def test_every_script_is_valid_and_stops_at_its_first_error(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -uo pipefail\n" in text or "\nset -euo pipefail\n" in text or "\nexec " in text


def test_links_between_documents_lead_somewhere() -> None:
    dead = []
    for path in text_files():
        if path.suffix == ".md":
            targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text())
            dead += [f"{name_of(path)}: {target}" for target in targets if not (path.parent / target).exists()]
    assert dead == []


def test_every_configuration_in_a_document_can_be_read(tmp_path: Path) -> None:
    documents = [path for path in text_files() if path.suffix == ".md"]
    blocks = [block for path in documents for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.M | re.S)]
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"block-{number}.yaml"
        path.write_text(block)
        load(path)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines if line and not line.startswith(("#", "-"))}


def test_the_pinned_set_satisfies_the_package_and_is_what_runs_here() -> None:
    cpu = pins("cpu.txt")
    assert all(cpu.values())
    asked = [re.match(r"([\w.-]+)==([^;\s]+)", line) for line in metadata.requires("megatron_rpp") or []]
    assert {match[1]: match[2] for match in asked if match} == {match[1]: cpu[match[1]] for match in asked if match}
    torch = cpu["torch"]
    assert f"torch=={torch}" in (ROOT / "tools" / "bootstrap.sh").read_text()
    assert f"torch-{torch}" in " ".join(path.name for path in (ROOT / "patches" / "locks").iterdir())
    for name in ("torch", "megatron-core", "sglang", "transformers", "numpy", "pydantic", "safetensors"):
        assert metadata.version(name).partition("+")[0] == cpu[name], name


def test_the_installed_package_is_this_one() -> None:
    assert metadata.version("megatron_rpp") == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    plugins = {entry.name: entry.value for entry in metadata.entry_points(group="sglang.srt.plugins")}
    assert plugins["megatron_rpp"] == "megatron_rpp_patches.sglang.plugin:register"
    code = "import megatron_rpp, megatron_rpp_patches; print(megatron_rpp.__path__[0], megatron_rpp_patches.__path__[0])"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/")
    assert result.stdout.split() == [str(ROOT / "megatron_rpp"), str(ROOT / "patches")]


def test_every_folder_of_tests_is_a_tier_that_runs() -> None:
    script = (ROOT / "tests" / "run.sh").read_text()
    tiers = re.search(r"^all_tiers=\((.*)\)$", script, re.M)[1].split()
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in python_files("tests") if path.name.startswith("test_")}
    assert folders - {"gpu"} == set(tiers)  # tests/gpu runs by itself, where there is one
    assert set(tiers) <= {marker.partition(":")[0] for marker in markers}


def test_test_names_are_sentences() -> None:
    """Of three words or more; where parameters name the cases, those are the sentences."""
    tests = [(path, one) for path in python_files("tests") for one in functions(tree_of(path)) if one.name.startswith("test_")]
    short = [(path, one) for path, one in tests if one.name.count("_") < 3]
    has_cases = [any("parametrize" in ast.unparse(decorator) for decorator in one.decorator_list) for _, one in short]
    assert [f"{name_of(path)} {one.name}" for (path, one), named in zip(short, has_cases, strict=True) if not named] == []


def test_the_source_passes_the_linter() -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    for command in (["check", "--quiet", "--output-format=concise", "--no-cache"], ["format", "--check", "--quiet", "--no-cache"]):
        result = subprocess.run([ruff, *command, str(ROOT)], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
