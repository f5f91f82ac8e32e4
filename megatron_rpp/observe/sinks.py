"""Where records go: metrics.jsonl and timings.jsonl, which are the run's memory, and TensorBoard, which is a view of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_rpp.errors import RppError
from megatron_rpp.files import write_all, write_whole, writing
from megatron_rpp.input_file import kind_of, parse_json, read_bytes, why_unreadable
from megatron_rpp.observe.metrics import Value

Encode = Callable[[str, int, Mapping[str, Value]], str]


class RecordFile:
    """An append-only file of records.

    A line that a crash cut off is removed when the file is opened. A run that goes on from the checkpoint of `resumed_step`
    first forgets the records of the steps that it will take again, so that the file reads as if nothing had happened; at 0
    there is no such checkpoint and nothing to keep.

    warnings: records of finished steps that are missing, doubled or out of order. The run does not need them to continue.
    """

    def __init__(self, path: Path, encode: Encode, *, resumed_step: int = 0) -> None:
        """encode: metrics.encode or metrics.encode_timing. Raises: RppError for a file that holds something else, OSError."""
        self.path, self._encode = path, encode
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if (reason := why_unreadable(path)) not in (None, "no such file"):
            raise _unreadable(path, reason)
        found = list(_records(path)) if resumed_step > 0 else []
        kept = [(line, record) for line, record in found if record["step"] <= resumed_step]
        if kept != found[: len(kept)]:
            write_whole(path, b"".join(line for line, _ in kept))
        self.warnings = tuple(_oddities(path.name, [record for _, record in found], resumed_step))
        with writing(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- held open for the length of the run
            self._file.truncate(sum(len(line) for line, _ in kept))

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
    """All complete records of a file, which another process may still be writing. Raises: RppError."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line and its record; a last line without its end is left out."""
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            return
        try:
            record = parse_json(line)
            _check(record)
        except ValueError as error:
            raise RppError(
                "not a record of a run", where=f"{path}:{number}", got=f"{line[:60]!r} ({error})", fix="remove that line"
            ) from None
        yield line, record


def _unreadable(path: Path, reason: str) -> RppError:
    return RppError("cannot read the records of the run", where=str(path), got=reason, fix="move it away, or choose another run.dir")


def _check(record: Any) -> None:
    """Raises: ValueError, which says why, for a value that metrics.encode never writes."""
    if not isinstance(record, dict):
        raise ValueError(f"{kind_of(record)}, not an object")
    if not isinstance(record.get("kind"), str):
        raise ValueError("the kind is not a word")
    if type(record.get("step")) is not int or not 0 <= record["step"] < 2**63:
        raise ValueError("the step is not a whole number of 0 or more")
    for name, value in record.items():
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{name!r} is not a number or a word")


def _oddities(name: str, records: list[dict[str, Any]], resumed_step: int) -> Iterator[str]:
    """What is wrong with the records of steps 1 to `resumed_step`, a warning each."""
    late = {after["step"] for before, after in pairwise(records) if after["step"] < before["step"]}
    counts = Counter((record["kind"], record["step"]) for record in records if record["step"] <= resumed_step)
    missing = [step for step in range(1, resumed_step + 1) if ("step", step) not in counts]
    if missing:
        yield f"{name} has no record of {_steps(missing)}. The run continues after step {resumed_step} without what is lost"
    if doubled := sorted({step for (_, step), count in counts.items() if count > 1}):
        yield f"{name} has more than one record of {_steps(doubled)}"
    if late := sorted(step for step in late if step <= resumed_step):
        yield f"{name} has the record of {_steps(late)} after that of a later step"


def _steps(steps: Sequence[int]) -> str:
    """Ascending numbers of steps in short: "steps 3-5, 9"."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    listed = ", ".join(texts[:20]) + (f" and {len(texts) - 20} more" if len(texts) > 20 else "")
    return f"step {listed}" if len(steps) == 1 else f"steps {listed}"


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
