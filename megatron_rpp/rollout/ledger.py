"""Finished responses on disk, so that a run that was stopped in the middle of a step does not sample them again.

One JSON line for each response, written and synced as soon as it ends, in one file for each step and leader. A line is
whole or it is not there: a torn last line, left by a process that was killed while writing, is not read and is cut off
before the next one is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from megatron_rpp.errors import CheckpointError
from megatron_rpp.files import make_inside, write_all, writing
from megatron_rpp.types import Response

Key = tuple[str, int, int]  # prompt uid, sample, version


class Ledger:
    """The responses of one run directory. Each leader writes files of its own and reads everybody's."""

    def __init__(self, folder: Path, leader: int = 0, *, root: Path | None = None) -> None:
        """root: the directory above `folder` that must exist, and that is not made anew when it was removed; default: the parent."""
        self._folder, self._root, self._leader = folder, root or folder.parent, leader
        self._open: tuple[str, BinaryIO] | None = None

    def load(self, name: str) -> dict[Key, Response]:
        """What the leaders finished under this name, such as "step-000012".

        Raises: CheckpointError for a line that is whole and not a response.
        """
        found: dict[Key, Response] = {}
        for path in sorted(self._folder.glob(f"{name}.leader-*.jsonl")):
            for number, line in enumerate(_whole_lines(path), 1):
                response = _parse(line, path, number)
                found[response.prompt_uid, response.sample, response.version] = response
        return found

    def append(self, name: str, responses: Sequence[Response]) -> None:
        """Write finished responses; on return they survive a crash of the machine. Raises: StorageError."""
        if not responses:
            return
        with writing(self._path(name)):
            file = self._file(name)
            write_all(file, b"".join(json.dumps(asdict(response)).encode() + b"\n" for response in responses))
            os.fsync(file.fileno())

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.leader-{self._leader}.jsonl"

    def _file(self, name: str) -> BinaryIO:
        if self._open is None or self._open[0] != name:
            self.close()
            make_inside(self._root, self._folder)
            path = self._path(name)
            whole_bytes = sum(len(line) + 1 for line in _whole_lines(path))
            file = open(path, "ab", buffering=0)  # noqa: SIM115 kept open between responses, closed by `close`
            file.truncate(whole_bytes)
            self._open = name, file
        return self._open[1]

    def close(self) -> None:
        """Close the file of the last name."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline; the newline is written last."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _parse(line: bytes, path: Path, number: int) -> Response:
    try:
        fields = json.loads(line)
        return Response(**fields | {"tokens": tuple(fields["tokens"]), "logp_rollout": tuple(fields["logp_rollout"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            "a line of the ledger is not a response",
            where=f"{path}:{number}",
            got=f"{type(error).__name__}: {error}",
            fix="delete the file; its responses will be sampled again",
        ) from error
