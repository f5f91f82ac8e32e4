"""Files of rows that would block their reader or never end."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_rpp.__main__ import main
from megatron_rpp.data.rows import MAX_LINE_BYTES, iter_rows
from megatron_rpp.errors import DataError
from tests.unit.odd_files import ODD_FILES, Make

NOT_FILES = ODD_FILES | {"nothing": (lambda path: None, "no such file")}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("make", "reason"), NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_regular_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, make: Make, reason: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    make(path)
    with pytest.raises(DataError, match=f"cannot read the file\n  got: {reason}"):
        list(iter_rows(path, ["a"]))
    assert main(["score", "--reward", "exact", "--input", str(path)]) == 1
    assert f"rpp score: {path}: cannot read the file\n  got: {reason}" in capsys.readouterr().err


def test_a_name_that_no_file_has_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--reward", "exact", "--input", "a" * 5000]) == 1
    assert "cannot read the file\n  got: File name too long" in capsys.readouterr().err


def test_a_file_that_is_one_endless_line_is_refused_after_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    os.truncate(path, 2**40)
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: the line is too long\n.*at most {MAX_LINE_BYTES:,} bytes"):
        list(iter_rows(path, ["a"]))
    assert time.monotonic() - start < 20


def test_lines_up_to_the_limit_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rpp.data.rows.MAX_LINE_BYTES", 20)
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "123456789"}\r\n\n{"a": "12345678901"}')
    assert [row.line for row in iter_rows(tmp_path / "rows.jsonl", ["a"])] == [1, 3]
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "1234567890123"}')
    with pytest.raises(DataError, match="too long"):
        list(iter_rows(tmp_path / "rows.jsonl", ["a"]))
