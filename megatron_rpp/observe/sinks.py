"""Where records go: metrics.jsonl and timings.jsonl, which are the run's memory, and TensorBoard, which is a view of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rpp.errors import RppError
from megatron_rpp.files import write_all, writing
from megatron_rpp.observe.metrics import Value

Encode = Callable[[str, int, Mapping[str, Value]], str]


class RecordFile:
    """An append-only file of records.

    A line that a crash cut off is removed when the file is opened. A run that goes on from the checkpoint of `resumed_step`
    first forgets the records of the steps that it will take again, so that the file reads as if nothing had happened; at 0
    there is no such checkpoint and nothing to keep.
    """

    def __init__(self, path: Path, encode: Encode, *, resumed_step: int = 0) -> None:
        """encode: metrics.encode or metrics.encode_timing."""
        self.path, self._encode = path, encode
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            keep = 0
            for offset, record in _records(path):
                if record["step"] <= resumed_step != 0:
                    keep = offset
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- held open for the length of the run
            self._file.truncate(keep)

    def append(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """Add one record; it survives the death of this process, and of this host once the kernel has written it back.

        Raises: StorageError.
        """
        line = self._encode(kind, step, values).encode("ascii") + b"\n"
        with writing(self.path):
            write_all(self._file, line)

    def has(self, kind: str, step: int) -> bool:
        """Whether such a record is there already, e.g. the evaluation of the step that a run goes on from."""
        return any(record["kind"] == kind and record["step"] == step for record in read(self.path))

    def close(self) -> None:
        if not self._file.closed:
            with writing(self.path):
                os.fsync(self._file.fileno())
                self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All complete records of a file, which another process may still be writing."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each complete record and the offset of its end; a last line without its end is left out."""
    end = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            record["step"] >= 0 and record["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise RppError(
                "not a record of a run", where=f"{path}:{number}", got=f"{line[:60]!r} ({error})", fix="remove that line"
            ) from None
        end += len(line)
        yield end, record


class TensorBoard:
    """Scalars for TensorBoard, at the finished step; events of steps that are taken again are marked as void."""

    def __init__(self, directory: Path, *, resumed_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RppError(
                "tensorboard cannot be imported",
                where="observe.tensorboard",
                got=error,
                fix="pip install tensorboard, or set observe.tensorboard: false",
            ) from None
        self._directory = directory
        with writing(directory):
            self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1 if resumed_step else None, flush_secs=10)

    def append(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """Words are left out: TensorBoard plots numbers."""
        with writing(self._directory):
            for name, value in values.items():
                if not isinstance(value, str):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with writing(self._directory):
            self._writer.close()
