"""Finished responses on disk, so that a run that was stopped in the middle of a step does not sample them again.

One JSON line for each response, written and synced as soon as it ends, in one file for each step and leader. A line is
whole or it is not there: a torn last line, left by a process that was killed while writing, is not read and is cut off
before the next one is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, get_args

from megatron_rpp.errors import CheckpointError
from megatron_rpp.files import make_inside, write_all, writing
from megatron_rpp.input_file import kind_of, parse_json, read_bytes
from megatron_rpp.types import FinishReason, Response

Key = tuple[str, int, int]  # prompt uid, sample, version

_FIX = "delete the file; its responses will be sampled again"
_FIELDS = {field.name for field in fields(Response)}


class Ledger:
    """The responses of one run directory. Each leader writes files of its own and reads everybody's.

    vocab_size: rows of the model's embedding; a token from the file that has no row would read foreign memory.
    """

    def __init__(self, folder: Path, leader: int = 0, *, vocab_size: int, root: Path | None = None) -> None:
        """root: the directory above `folder` that must exist, and that is not made anew when it was removed; default: the parent."""
        self._folder, self._root, self._leader, self._vocab_size = folder, root or folder.parent, leader, vocab_size
        self._open: tuple[str, BinaryIO] | None = None

    def load(self, name: str) -> dict[Key, Response]:
        """What the leaders finished under this name, such as "step-000012".

        Raises: CheckpointError for a line that is whole and not a response of this model, and for a file that cannot be read.
        """
        found: dict[Key, Response] = {}
        for path in sorted(self._folder.glob(f"{name}.leader-*.jsonl")):
            for number, line in enumerate(_whole_lines(path), 1):
                response = _parse(line, f"{path}:{number}", self._vocab_size)
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
    """The lines that end in a newline; the newline is written last. Raises: CheckpointError."""
    try:
        return read_bytes(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError("cannot read the ledger", where=str(path), got=error.strerror, fix=_FIX) from None


def _parse(line: bytes, where: str, vocab_size: int) -> Response:
    try:
        values = parse_json(line)
        _check(values, vocab_size)
    except ValueError as error:
        raise CheckpointError("a line of the ledger is not a response", where=where, got=error, fix=_FIX) from None
    return Response(**values | {"tokens": tuple(values["tokens"]), "logp_rollout": tuple(values["logp_rollout"])})


def _check(values: Any, vocab_size: int) -> None:
    """Raises: ValueError, which says why, unless `values` are the fields of a response."""
    if not isinstance(values, dict):
        raise ValueError(f"{kind_of(values)}, not an object")
    if values.keys() != _FIELDS:
        raise ValueError(f"the fields {', '.join(sorted(values.keys() ^ _FIELDS))} are missing or unknown")
    for name in ("prompt_uid", "text"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is {values[name]!r}, not text")
    for name in ("sample", "version"):
        if not _is_count(values[name]):
            raise ValueError(f"{name} is {values[name]!r}, not a whole number of 0 or more")
    if values["finish_reason"] not in get_args(FinishReason):
        raise ValueError(f"finish_reason is {values['finish_reason']!r}, not one of {', '.join(get_args(FinishReason))}")
    if values["score"] is not None and not _is_number(values["score"]):
        raise ValueError(f"score is {values['score']!r}, not a finite number or null")
    if not isinstance(values["reward_failed"], str | None):
        raise ValueError(f"reward_failed is {values['reward_failed']!r}, not text or null")
    _check_tokens(values, vocab_size)


def _check_tokens(values: Mapping[str, Any], vocab_size: int) -> None:
    """Raises: ValueError, which says why."""
    tokens, logp = values["tokens"], values["logp_rollout"]
    if not (isinstance(tokens, list) and isinstance(logp, list) and len(tokens) == len(logp)):
        raise ValueError("tokens and logp_rollout are not two lists of one length")
    for place, token in enumerate(tokens):
        if not (_is_count(token) and token < vocab_size):
            raise ValueError(f"tokens[{place}] is {token!r}, not a token of the model, which has {vocab_size}")
    for place, value in enumerate(logp):
        if not _is_number(value):
            raise ValueError(f"logp_rollout[{place}] is {value!r}, not a finite number")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True and False are int too


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
