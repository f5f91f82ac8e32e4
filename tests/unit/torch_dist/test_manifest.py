"""files.json and the directory hold the same files, or the checkpoint is refused by file and reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.manifest import check_content, fingerprint, read_manifest, write_manifest

GOOD = {"bytes": 1, "crc32": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory of two files that is listed, and of a folder that need not be."""
    (tmp_path / "hf").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, {name: fingerprint(tmp_path / name) for name in ("a", "b")})
    return tmp_path


def test_a_list_that_agrees_is_read(folder: Path) -> None:
    found = read_manifest(folder)
    assert found == {"a": {"bytes": 1, "crc32": 3904355907}, "b": {"bytes": 1, "crc32": 1908338681}}
    check_content(folder / "a", found["a"])
    with pytest.raises(CheckpointError, match="checksum"):
        check_content(folder / "a", found["b"])


@pytest.mark.parametrize("value", [{}, [], None, 3, "x", [1], {"a": GOOD}, {"a": GOOD, "b": GOOD, "c": GOOD}])
def test_a_list_of_other_files_is_refused(value: object, folder: Path) -> None:
    (folder / "files.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"not a list of files|is not in the list of files|is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "x\0", "files.json", "hf/config.json"])
def test_a_name_that_leaves_the_directory_is_refused(name: str, folder: Path) -> None:
    (folder / "files.json").write_text(json.dumps({"a": GOOD, "b": GOOD, name: GOOD}))
    with pytest.raises(CheckpointError, match="a name is not that of a file beside it"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "entry", [None, 1, [], {}, {"bytes": 1}, {**GOOD, "x": 1}, {**GOOD, "bytes": "1"}, {**GOOD, "crc32": -1}, {**GOOD, "bytes": True}]
)
def test_an_entry_of_another_type_is_refused(entry: object, folder: Path) -> None:
    (folder / "files.json").write_text(json.dumps({"a": GOOD, "b": entry}))
    with pytest.raises(CheckpointError, match="the entry of 'b' is malformed"):
        read_manifest(folder)


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "deep": lambda file: file.write_text("[" * 10**6),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "endless": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_list_that_cannot_be_read_is_one_error(how: str, folder: Path) -> None:
    UNREADABLE[how](folder / "files.json")
    with pytest.raises(CheckpointError, match=r"files\.json"):
        read_manifest(folder)
