"""Files that somebody else made: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from megatron_rpp.errors import CheckpointError, DataError
from megatron_rpp.input_file import MAX_DEPTH, MAX_JSON_BYTES, open_file, parse_json, read_bytes, read_object, why_unreadable
from tests.unit.odd_files import ODD_FILES, Make, make_sparse


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


NOT_FILES = ODD_FILES | {
    "nothing": (lambda path: None, "no such file"),
    "a socket": (make_socket, "a socket, not a regular file"),
}
NO_NAMES = {"a\0b": "no file can have this name", "\ud800": "no file can have this name", "a" * 300: "File name too long"}


@pytest.mark.parametrize(("make", "reason"), NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_regular_file_is_refused_at_once_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = tmp_path / "input"
    make(path)
    start = time.monotonic()
    assert why_unreadable(path) == reason
    with pytest.raises(OSError) as caught:
        open_file(path)
    assert caught.value.strerror == reason
    with pytest.raises(CheckpointError) as refused:
        read_object(path, CheckpointError)
    assert f"{path}: cannot read the file\n  got: {reason}" in str(refused.value)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(("name", "reason"), NO_NAMES.items(), ids=["NUL", "surrogate", "long"])
def test_a_name_that_no_file_has_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    assert why_unreadable(tmp_path / name) == reason
    assert why_unreadable(tmp_path / name, is_directory=True) == reason
    with pytest.raises(OSError, match=reason):
        read_bytes(tmp_path / name)


def test_a_directory_is_told_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert why_unreadable(tmp_path, is_directory=True) is None
    assert why_unreadable(tmp_path / "file") is None
    assert why_unreadable(tmp_path / "file", is_directory=True) == "a file, not a directory"
    assert why_unreadable(tmp_path / "nowhere", is_directory=True) == "no such directory"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_file_of_somebody_else_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "file")
        path.write_bytes(b"{}")
        path.chmod(0o600)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(0 if why_unreadable(path) == "Permission denied" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_of_any_size_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    make_sparse(path)
    with pytest.raises(DataError, match=f"it has 1,099,511,627,776 bytes; at most {MAX_JSON_BYTES:,} are read"):
        read_object(path, DataError)
    os.truncate(path, 5)
    assert read_bytes(path, max_bytes=5) == bytes(5)
    with pytest.raises(OSError, match="at most 4 are read"):
        read_bytes(path, max_bytes=4)


REFUSED = {
    "Infinity": (b'{"a": Infinity}', "Infinity is not a JSON number"),
    "-Infinity": (b"[-Infinity]", "-Infinity is not a JSON number"),
    "NaN": (b"NaN", "NaN is not a JSON number"),
    "1e999": (b"[1e999]", "1e999 is beyond the range of a float"),
    "-1e999": (b"[-1e999]", "-1e999 is beyond the range of a float"),
    "5,000 digits": (b"9" * 5000, "a number has thousands of digits"),
    "a name twice": (b'{"x": {"a": 1, "b": 2, "a": 1}}', "the name 'a' is given twice in one object"),
    "deep lists": (b"[" * 100_000, f"nested more than {MAX_DEPTH} levels deep"),
    "deep objects": (b'{"a":' * 100_000, f"nested more than {MAX_DEPTH} levels deep"),
    "one level too many": (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), f"nested more than {MAX_DEPTH} levels deep"),
    "half a pair": (b'["\\uD800"]', "half of a surrogate pair"),
    "half a pair as a name": (b'{"\\udc00x": 1}', "half of a surrogate pair"),
    "not UTF-8": (b'"\xff"', r"not UTF-8 \(byte 2\)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "nothing": (b"", "Expecting value"),
    "two values": (b"{} {}", "Extra data"),
    "NUL": (b"\0", "Expecting value"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_json_or_not_safe_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(data)
    (tmp_path / "f.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"f\.json: cannot read the file as JSON\n  got: .*{reason}"):
        read_object(tmp_path / "f.json", DataError)


def test_json_is_read_as_python_reads_it() -> None:
    value = {"a": [1, -2.5, 1e300, None, True, "\U0001f600 \u2028 \\ud"], "b": {"a": {}}}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("text", "kind"), [("[1]", "a list"), ("null", "null"), ("1", "a number"), ("true", "true or false"), ('"a"', "a string")]
)
def test_a_value_that_is_no_object_is_named(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DataError, match=f"the file does not hold a JSON object\n  got: {kind}"):
        read_object(tmp_path / "f.json", DataError)


def test_only_a_file_that_is_not_there_has_a_default(tmp_path: Path) -> None:
    assert read_object(tmp_path / "f.json", DataError, default={}) == {}
    os.mkfifo(tmp_path / "f.json")
    with pytest.raises(DataError, match="a named pipe"):
        read_object(tmp_path / "f.json", DataError, default={})
