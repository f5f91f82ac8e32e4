"""The safetensors file format, as far as streaming needs it: a length, a JSON header, the tensors' bytes.

The library's own writer wants all tensors in memory at once, and its reader's errors do not say which tensor is broken.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.errors import CheckpointError
from megatron_rpp.input_file import kind_of, open_file, parse_json
from megatron_rpp.weights.rect import Shape

WIDE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = WIDE_DTYPES | {"F8_E4M3": torch.float8_e4m3fn}  # alone the latter is no number: its scales are another tensor
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_DIMS = 64  # torch's own limit
_FETCH = "the file is truncated or damaged: fetch it again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. start: offset of its first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file, without reading them.

    Raises: CheckpointError naming the file, and the tensor where one is to blame: no file, not a safetensors file, an unknown
    dtype, a length that does not fit the shape, tensors that overlap or reach past the end of the file.
    """
    header, data_start, size = _read_json(file)
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        entry, end = _entry(file, name, fields, data_start)
        if end > size:
            raise CheckpointError(f"{name} ends after the file does", where=str(file), expected=f"{end} bytes", got=size, fix=_FETCH)
        entries[name] = entry
        spans.append((entry.start, end, name))
    end_of_last = data_start
    for start, end, name in sorted(spans):
        if start != end_of_last:
            what = f"{name} does not start where the tensor before it ends"
            raise CheckpointError(what, where=str(file), expected=f"byte {end_of_last}", got=start)
        end_of_last = end
    if end_of_last != size:
        raise CheckpointError("bytes that belong to no tensor", where=str(file), expected=f"{end_of_last} bytes", got=size)
    return entries


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, offset of the first tensor, size of the file)."""
    try:
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError("no complete safetensors header", where=str(file), got=f"{size} bytes", fix=_FETCH)
            header = parse_json(stream.read(length))
    except OSError as error:
        raise CheckpointError("cannot read the file", where=str(file), got=error.strerror) from error
    except ValueError as error:
        raise CheckpointError("cannot read the header as JSON", where=str(file), got=error, fix=_FETCH) from error
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object", where=str(file), got=kind_of(header))
    return header, 8 + length, size


def _entry(file: Path, name: str, fields: Any, data_start: int) -> tuple[Entry, int]:
    try:
        kind, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        whole = isinstance(kind, str) and len(shape) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{name} has no proper dtype, shape and offsets", where=str(file), got=fields)
    if kind not in DTYPES:
        raise CheckpointError(f"{name} is not of a dtype that weights can have", where=str(file), expected=sorted(DTYPES), got=kind)
    entry = Entry(file, DTYPES[kind], shape, data_start + start)
    if entry.num_bytes != end - start:
        raise CheckpointError(f"{name} is as long as another shape", where=str(file), expected=f"{entry.num_bytes} bytes", got=end - start)
    return entry, data_start + end


def write_header(file: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> dict[str, Entry]:
    """Creates a file of its final size, whose tensors are still to be written at their `start`.

    Raises: CheckpointError for a dtype that weights cannot have; OSError.
    """
    text, num_bytes = make_header(file, shapes, dtypes)
    with file.open("xb") as stream:
        stream.write(text)
        stream.truncate(len(text) + num_bytes)
    return read_header(file)


def make_header(file: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> tuple[bytes, int]:
    """(what a file begins with, bytes of the tensors that follow it one after the other). file: for messages.

    Raises: CheckpointError for a dtype that weights cannot have.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        if dtypes[name] not in _NAMES:
            raise CheckpointError(f"cannot store this dtype, that of {name}", where=str(file), expected=sorted(DTYPES), got=dtypes[name])
        end = offset + math.prod(shape) * dtypes[name].itemsize
        fields[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return struct.pack("<Q", len(text)) + text, offset
