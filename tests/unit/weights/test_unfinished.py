"""A journal that is not what was written means that nothing is finished, not a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.weights.unfinished import Unfinished

ENTRY = {"bytes": 3, "crc32": 891568578, "notes": [[0, 3]]}
GOOD = {"job": "j", "files": {"a": ENTRY}}


def opened(folder: Path, journal: str) -> bool:
    """Whether a run takes up what the journal says is finished."""
    work = folder / ".out.unfinished"
    work.mkdir()
    (work / "a").write_text("abc")
    (work / "journal.json").write_text(journal)
    with Unfinished(folder / "out", "j") as unfinished:
        return unfinished.is_resumed and unfinished.finished("a") == [[0, 3]]


def test_a_good_journal_is_taken_up(tmp_path: Path) -> None:
    assert opened(tmp_path, json.dumps(GOOD))


@pytest.mark.parametrize(
    "journal",
    [
        *([], None, 3, "x", {}, {"job": "j"}, {"job": "k", "files": {"a": ENTRY}}, {"job": "j", "files": []}),
        *({"job": "j", "files": {"a": entry}} for entry in (None, 3, [], {}, {"bytes": 3}, ENTRY | {"notes": 3}, ENTRY | {"notes": [3]})),
        {"job": "j", "files": {"a": ENTRY | {"notes": [[0, "3"]]}}},
    ],
)
def test_a_journal_of_wrong_types_is_thrown_away(journal: Any, tmp_path: Path) -> None:
    assert not opened(tmp_path, json.dumps(journal))


@pytest.mark.parametrize("text", ["", "{", "[" * 10**6, "\0"])
def test_a_journal_that_is_not_json_is_thrown_away(text: str, tmp_path: Path) -> None:
    assert not opened(tmp_path, text)
