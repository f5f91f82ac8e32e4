"""tools/check_fixtures.py in this process, and files for it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_fixtures.py"
Capture = pytest.CaptureFixture[str]


@contextmanager
def imported() -> Iterator[ModuleType]:
    """The tool as a module. It imports its families from beside itself, as a script finds them."""
    spec = importlib.util.spec_from_file_location("check_fixtures", TOOL)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL.parent))
        spec.loader.exec_module(module)
        yield module


def write(path: Path, fixtures: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"conventions": {"tolerance": "rtol 1e-8, atol 1e-9"}, "fixtures": fixtures}))
    return path


def refused(path: Path, tool: ModuleType, capsys: Capture) -> str:
    """The one line of a file that cannot be used."""
    assert tool.main([str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert all(part in said.err for part in ("error: ", "; expected: ", "; got: ", "; fix: "))
    return said.err
