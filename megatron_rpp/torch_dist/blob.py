"""What `torch.save` writes: a zip of a pickle and of the storages that it names, read from a larger file.

Only what `torch.save` makes of a tensor or a plain object is read: stored records, little-endian, no code.
The size of every record is compared with the range before memory is taken.
Source: torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.pickles import FETCH, Piece, unpickle

_BROKEN_ZIP = (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, zlib.error, EOFError, LookupError, ValueError, OverflowError)
_BROKEN_ZIP += (RuntimeError, MemoryError)  # an unknown version, encryption
_LOCAL_HEADER, _HEADER_BYTES = b"PK\3\4", 30


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a file. Units: start, length in bytes."""

    file: Path
    start: int
    length: int


class Blob:
    """One zip of `torch.save`. stream: of the span's file; stays open while the blob is used.

    what: names the blob in errors. Raises: CheckpointError when it is not such a zip; OSError.
    """

    def __init__(self, stream: BinaryIO, span: Span, what: str) -> None:
        self.stream, self.span, self.what = stream, span, what
        try:
            with zipfile.ZipFile(_Window(stream, span.start, span.length)) as archive:
                self.records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                self.pickle = archive.read(self._record("data.pkl"))
                order = archive.read(self._record("byteorder")) if "byteorder" in self.records else b"little"
        except _BROKEN_ZIP as error:
            raise self._wrong("is not what torch.save writes", f"{type(error).__name__}: {error}") from error
        if order != b"little":
            raise self._wrong("is not little-endian", order)

    def _record(self, name: str) -> zipfile.ZipInfo:
        record = self.records[name]
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size or record.file_size > self.span.length:
            raise ValueError(f"{name} is compressed, or larger than the file")
        return record

    def tensor(self) -> Piece:
        """The description of the one tensor that the blob is.

        Raises: CheckpointError when it is anything else.
        """
        piece = unpickle(self.pickle, where=f"{self.span.file}: {self.what}", tensor=lambda piece: piece)
        if type(piece) is not Piece:
            raise self._wrong("is not a tensor", type(piece).__name__)
        return piece

    def value(self) -> object:
        """The object that the blob is, its tensors in memory. Raises: CheckpointError; OSError."""
        return unpickle(self.pickle, where=f"{self.span.file}: {self.what}", tensor=self.read)

    def read(self, piece: Piece) -> Tensor:
        """A tensor of the blob. Shapes: -> piece.shape. Raises: CheckpointError; OSError."""
        first = self.first_byte(piece)  # compares sizes, so that no more is allocated than the file holds
        storage = torch.empty(piece.numel, dtype=piece.dtype)
        self.stream.seek(first)
        fill(self.stream, storage, str(self.span.file))
        return storage.as_strided(piece.shape, piece.strides, piece.offset)

    def first_byte(self, piece: Piece) -> int:
        """Where in the file the storage of a tensor begins.

        Raises: CheckpointError when it is not all there; OSError.
        """
        num_bytes = piece.numel * piece.dtype.itemsize
        try:
            record = self._record(f"data/{piece.record}")
            self.stream.seek(self.span.start + record.header_offset)
            header = self.stream.read(_HEADER_BYTES)
            name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        except _BROKEN_ZIP as error:
            raise self._wrong("is not what torch.save writes", f"{type(error).__name__}: {error}") from error
        first = record.header_offset + _HEADER_BYTES + name_bytes + extra_bytes
        if record.file_size != num_bytes or header[:4] != _LOCAL_HEADER or not 0 <= first <= self.span.length - num_bytes:
            raise self._wrong(f"has no storage of {num_bytes} bytes", f"{record.file_size} bytes at {first} of {self.span.length}")
        return self.span.start + first

    def _wrong(self, what: str, got: object) -> CheckpointError:
        return CheckpointError(f"{self.what} {what}", where=str(self.span.file), got=got, fix=FETCH)


def fill(stream: BinaryIO, tensor: Tensor, where: str) -> None:
    """Reads a contiguous tensor from where a file stands.

    Raises: CheckpointError when the file ends before it; OSError.
    """
    wanted = memoryview(tensor.flatten().view(torch.uint8).numpy())
    while len(wanted):
        got = stream.readinto(wanted)  # type: ignore[attr-defined]  # the kernel may hand over less than was asked for
        if not got:
            raise CheckpointError("the file ends too early", where=where, expected=f"{len(wanted)} more bytes", got=0, fix=FETCH)
        wanted = wanted[got:]


class _Window(io.RawIOBase):
    """A run of bytes of a file as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self.inner, self.start, self.length, self.at = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if self.at < 0:
            raise ValueError("before the start")
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(self.length - self.at, 0)
        self.inner.seek(self.start + self.at)
        data = self.inner.read(left if size < 0 else min(size, left))
        self.at += len(data)
        return data
