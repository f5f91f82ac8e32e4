"""Errors of files in words, files that are whole or not there, directories that do not come back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_rpp.errors import CheckpointError, StorageError
from megatron_rpp.files import (
    describe_space,
    make_inside,
    refuse_full,
    refuse_unusable,
    storage_errors_named,
    write_all,
    write_whole,
    writing,
)


def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError) as raised,
        writing(tmp_path / "metrics.jsonl"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        write_all(full, b"record")
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/metrics.jsonl: the file system refused: No space left on device")
    assert " are free on /" in text
    assert "free some space there" in text
    assert "resumes from its newest checkpoint" in text


def test_space_is_that_of_the_file_system_that_holds_the_path() -> None:
    usage = os.statvfs("/dev/shm")
    text = describe_space(Path("/dev/shm/none/of/these/exists"))
    assert text.endswith("are free on /dev/shm (tmpfs)")
    assert f"of {usage.f_blocks * usage.f_frsize / 2**20:.1f} MiB" in text or "GiB" in text


def test_every_byte_is_written_where_the_system_takes_a_part() -> None:
    class Slow:
        def __init__(self) -> None:
            self.taken = b""

        def write(self, data: memoryview) -> int:
            self.taken += bytes(data[:3])
            return min(len(data), 3)

    file = Slow()
    write_all(file, b"ten bytes.")
    assert file.taken == b"ten bytes."


@pytest.mark.parametrize(("place", "got"), [("file", "is not a directory"), ("file/below/run", "is not a directory")])
def test_a_file_in_the_way_is_refused_with_the_setting(tmp_path: Path, place: str, got: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"run.dir={tmp_path / place}(.|\n)*{got}"):
        refuse_unusable(tmp_path / place, "run.dir")


def test_what_can_be_made_is_not_made_by_looking(tmp_path: Path) -> None:
    refuse_unusable(tmp_path / "a" / "b", "run.dir")
    refuse_unusable(tmp_path, "run.dir")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    if os.getuid() == 0:  # who may write everywhere; the kernel would say no on a read-only file system alone
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(StorageError, match=rf"sft.out={tmp_path}/out(.|\n)*write permission in {tmp_path}"):
        refuse_unusable(tmp_path / "out", "sft.out")


def test_a_path_that_is_too_long_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File name too long"):
        refuse_unusable(tmp_path / ("x" * 300), "run.dir")


def test_a_result_that_does_not_fit_is_refused_with_both_sizes() -> None:
    refuse_full(Path("/dev/shm/out"), 0, "sft.out")
    with pytest.raises(
        StorageError, match=r"sft.out=/dev/shm/out: the disk has too little space(.|\n)*expected: 1024.0 TiB free(.|\n)*\(tmpfs\)"
    ):
        refuse_full(Path("/dev/shm/out"), 2**50, "sft.out")


def test_directories_are_made_inside_a_root_alone(tmp_path: Path) -> None:
    make_inside(tmp_path, tmp_path / "ledger" / "digest")
    assert (tmp_path / "ledger" / "digest").is_dir()
    make_inside(tmp_path, tmp_path / "ledger" / "digest")
    gone = tmp_path / "gone"
    with pytest.raises(StorageError, match="No such file or directory"):
        make_inside(gone, gone / "ledger" / "digest")
    assert not gone.exists()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "state.json", "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "state.json", "second\ud800")
    assert (tmp_path / "state.json").read_text() == "first"


def test_an_error_of_the_disk_is_found_under_what_a_library_made_of_it() -> None:
    def fail() -> None:
        try:
            raise OSError(errno.EIO, "Input/output error", "/data/x")
        except OSError as error:
            raise RuntimeError("worker failure") from error

    with pytest.raises(StorageError, match="/data/x: the file system refused: Input/output error"), storage_errors_named():
        fail()


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "reset"), PermissionError(errno.EPERM, "kill"), ValueError("x"), CheckpointError("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, storage_errors_named():
        raise error
    assert raised.value is error


def test_a_path_that_was_only_tried_is_not_taken_for_the_cause() -> None:
    def fail() -> None:
        try:
            Path("/none/such").read_bytes()
        except OSError:
            raise ValueError("a defect")  # noqa: B904  the context is the point

    with pytest.raises(ValueError, match="a defect"), storage_errors_named():
        fail()
