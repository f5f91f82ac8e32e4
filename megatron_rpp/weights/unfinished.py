"""A directory in the making: its files are written one by one under another name, and one rename makes it what was asked for.

.<name>.unfinished/             beside the final <name>; stays there when the process dies, and is gone on with by the next
    <file>                      finished: complete and on disk, listed with its checksum
    <file>.part                 the one that was being written
    journal.json                {"job": ..., "files": {name: {"bytes", "crc32", "notes"}}}
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.manifest import fingerprint
from megatron_rpp.weights.hf_io import flush

_JOURNAL = "journal.json"


class CountedFile:
    """A file that is only written on. at: bytes so far; crc32: of them."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.at, self.crc32 = stream, 0, 0

    def write(self, data: Any) -> int:
        """All of the data. Raises: OSError."""
        self.stream.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.at += len(data)
        return len(data)


class Unfinished:
    """The directory in the making. Use as a context manager: it holds a lock meanwhile, so that no two runs share it.

    job: whatever makes two runs the same; files of another job are thrown away. is_resumed: there were files of this one.
    Raises: CheckpointError when `final` exists and may not be overwritten, or another process is at it; OSError.
    """

    def __init__(self, final: Path, job: str, *, overwrite: bool = False) -> None:
        if final.exists() and not overwrite:
            raise CheckpointError("already exists", where=str(final), fix="choose another directory, or overwrite it with --overwrite")
        self.final, self.folder = final, final.parent / f".{final.name}.unfinished"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise CheckpointError("another process is writing it", where=str(final), fix="wait for it, or stop it") from error
        self._journal = self._read_journal(job)
        self.is_resumed = bool(self._journal["files"])

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)

    def _read_journal(self, job: str) -> dict[str, Any]:
        """What an earlier run of this job finished. Everything else that lies in the folder is thrown away."""
        found: Any = None
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("job") != job or not _are_entries(found.get("files")):
            found = {"job": job, "files": {}}
        for file in self.folder.iterdir():
            if file.name not in found["files"] and file.name != _JOURNAL:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        return found

    @property
    def fingerprints(self) -> dict[str, dict[str, int]]:
        """Finished file -> its bytes and CRC-32."""
        return {name: {key: entry[key] for key in ("bytes", "crc32")} for name, entry in self._journal["files"].items()}

    def finished(self, name: str) -> Any | None:
        """What was noted about a file that an earlier run finished and that is still what it was; else None."""
        entry = self._journal["files"].get(name)
        if entry is None:
            return None
        try:
            is_same = fingerprint(self.folder / name) == {"bytes": entry["bytes"], "crc32": entry["crc32"]}
        except OSError:
            is_same = False
        return entry["notes"] if is_same else None

    @contextmanager
    def writing(self, name: str, notes: Any) -> Iterator[CountedFile]:
        """A new file, finished when the block ends well. notes: JSON to keep with it; may be filled in the block."""
        part = self.folder / f"{name}.part"
        with part.open("wb") as stream:
            counted = CountedFile(stream)
            yield counted
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(self.folder / name)
        self._journal["files"][name] = {"bytes": counted.at, "crc32": counted.crc32, "notes": notes}
        written = self.folder / f"{_JOURNAL}.part"
        written.write_text(json.dumps(self._journal), encoding="utf-8")
        flush(written)
        written.rename(self.folder / _JOURNAL)

    def complete(self) -> None:
        """The directory gets its name; one that is overwritten stands until then. Raises: OSError."""
        (self.folder / _JOURNAL).unlink()
        for path in sorted(self.folder.rglob("*")):
            flush(path)
        flush(self.folder)
        old = self.final.parent / f".{self.final.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.folder.rename(self.final)
        flush(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)


def _are_entries(files: Any) -> bool:
    """Whether a journal's files are what `writing` notes: it may have been cut off by a full disk, or changed."""
    keys = {"bytes", "crc32", "notes"}
    if not isinstance(files, dict) or any(not isinstance(entry, dict) or entry.keys() != keys for entry in files.values()):
        return False
    notes = [entry["notes"] for entry in files.values()]
    return all(note is True or (isinstance(note, list) and all(map(_is_span, note))) for note in notes)


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value)
