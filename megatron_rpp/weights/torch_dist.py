"""torch_dist checkpoints as files: tensors in blobs, and a list that says where. Neither megatron nor a process group is needed.

A blob is what `torch.save` makes of one piece of a tensor: a zip whose record data/0 is the elements as they lie in memory.
They are read from there directly, any rectangle of them, so that no blob is ever loaded whole. Pickles come from elsewhere:
only the few classes that a checkpoint is made of are let in.
Source: torch.distributed.checkpoint (filesystem.py, metadata.py) and megatron.core.dist_checkpointing, format "torch_dist" 1.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights.rect import Shape

LIST, COMMON, KIND = ".metadata", "common.pt", "metadata.json"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
_KIND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_FETCH = "the checkpoint is damaged: fetch it again, or take an older one"
_BROKEN_PICKLE = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, ImportError)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the blob that holds it. start, length: of the blob in the file, in bytes."""

    offsets: Shape
    sizes: Shape
    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor over all its chunks, which together cover it once."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]


def is_torch_dist(folder: Path) -> bool:
    """Whether this is a directory of the kind. Raises nothing."""
    return (folder / LIST).is_file()


def read_list(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its key, optimizer state included; objects are left out.

    Raises: CheckpointError naming the file, and the tensor where one is to blame: no list, not a list, chunks that leave
    their tensor or do not cover it, a blob that is missing or reaches past the end of its file.
    """
    file = folder / LIST
    try:
        found = _ListUnpickler(io.BytesIO(file.read_bytes())).load()
    except OSError as error:
        raise CheckpointError("cannot read the list of tensors", where=str(file), got=error) from error
    except _BROKEN_PICKLE as error:
        raise CheckpointError("not a list of tensors", where=str(file), got=error, fix=_FETCH) from error
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise CheckpointError("not a list of tensors", where=str(file), got=type(found).__name__, fix=_FETCH)
    return _Listed(folder, found).tensors()


class _Listed:
    """The list of a directory, checked against its files."""

    def __init__(self, folder: Path, found: metadata.Metadata) -> None:
        self.folder, self.found = folder, found
        self.file_bytes: dict[Path, int] = {}

    def tensors(self) -> dict[str, Stored]:
        entries = self.found.state_dict_metadata.items()
        return {key: self._stored(key, entry) for key, entry in entries if isinstance(entry, metadata.TensorStorageMetadata)}

    def _stored(self, key: str, entry: metadata.TensorStorageMetadata) -> Stored:
        shape = tuple(entry.size)
        chunks = tuple(self._chunk(key, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
        for chunk in chunks:
            if len(chunk.sizes) != len(shape) or any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
                got = f"{chunk.sizes} at {chunk.offsets}"
                raise CheckpointError(f"{key} has a part outside its shape", where=str(chunk.file), expected=f"inside {shape}", got=got)
        held, wanted = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
        if held != wanted:
            where = str(self.folder / LIST)
            raise CheckpointError(f"{key} is not whole", where=where, expected=f"{wanted} elements", got=held, fix=_FETCH)
        return Stored(entry.properties.dtype, shape, chunks)

    def _chunk(self, key: str, offsets: Shape, sizes: Shape) -> Chunk:
        place = self.found.storage_data.get(metadata.MetadataIndex(key, torch.Size(offsets)))
        if place is None or Path(place.relative_path).name != place.relative_path:
            got = "nowhere" if place is None else place.relative_path
            raise CheckpointError(f"{key} {list(offsets)} has no file", where=str(self.folder / LIST), expected="a file here", got=got)
        file = self.folder / place.relative_path
        if file not in self.file_bytes:
            try:
                self.file_bytes[file] = file.stat().st_size
            except OSError as error:
                raise CheckpointError(f"cannot read {key}", where=str(file), got=error, fix=_FETCH) from error
        end = place.offset + place.length
        if end > self.file_bytes[file]:
            what, expected = f"{key} ends after the file does", f"{end} bytes"
            raise CheckpointError(what, where=str(file), expected=expected, got=self.file_bytes[file], fix=_FETCH)
        return Chunk(offsets, sizes, file, place.offset, place.length)


class _ListUnpickler(pickle.Unpickler):
    """Lets in what a list of tensors is made of, and nothing that can act."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)):
            return getattr(torch, name)
        if (module, name) in (("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        found = getattr({part.__name__: part for part in (metadata, planner, filesystem)}.get(module), name, None)
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def first_element(stream: BinaryIO, chunk: Chunk, key: str, dtype: torch.dtype) -> int:
    """Where in the chunk's file its first element lies; the others follow in C order.

    Raises: CheckpointError naming the file and the tensor when the blob is not one tensor of that shape and dtype; OSError.
    """
    try:
        with zipfile.ZipFile(_Window(stream, chunk.start, chunk.length)) as blob:
            records = {name.partition("/")[2]: blob.getinfo(name) for name in blob.namelist()}
            found = _BlobUnpickler(io.BytesIO(blob.read(records["data.pkl"]))).load()
            order = blob.read(records["byteorder"]) if "byteorder" in records else b"little"
            data = records[f"data/{found[0]}"]
        stream.seek(chunk.start + data.header_offset)
        local_header = stream.read(30)
        name_bytes, extra_bytes = struct.unpack("<HH", local_header[26:30])
    except (*_BROKEN_PICKLE, zipfile.BadZipFile, struct.error) as error:
        raise CheckpointError(f"{key} {list(chunk.offsets)} is not a tensor", where=str(chunk.file), got=error, fix=_FETCH) from error
    strides = tuple(math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes)))
    expected = (dtype, 0, chunk.sizes, strides, math.prod(chunk.sizes) * dtype.itemsize, b"little", zipfile.ZIP_STORED)
    if (got := (*found[1:], data.file_size, order, data.compress_type)) != expected:
        what = f"{key} {list(chunk.offsets)} is another tensor"
        raise CheckpointError(what, where=str(chunk.file), expected=expected, got=got, fix=_FETCH)
    return chunk.start + data.header_offset + 30 + name_bytes + extra_bytes


class _BlobUnpickler(pickle.Unpickler):
    """-> (record, dtype, storage offset, shape, strides) of the one tensor that a blob stands for, which is not built."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (*storage, offset, tuple(shape), _as_if_long(shape, strides))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor")

    def persistent_load(self, what: Any) -> tuple[str, torch.dtype]:
        _, dtype, record, *_ = what
        return record, dtype


def _as_if_long(shape: Shape, strides: Shape) -> Shape:
    """An axis of one element may have any stride; make it the one of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) if shape[axis] == 1 else stride for axis, stride in enumerate(strides))


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


def write_list(folder: Path, tensors: Mapping[str, Stored], objects: Iterable[str], blob: Chunk) -> None:
    """Writes `.metadata`. objects: keys of objects, all of which are the one in `blob`. Raises: OSError."""
    entries: dict[str, Any] = {}
    places: dict[metadata.MetadataIndex, Any] = {}
    for key, tensor in tensors.items():
        boxes = [metadata.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
        properties = metadata.TensorProperties(dtype=tensor.dtype)
        entries[key] = metadata.TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
        for chunk in tensor.chunks:
            place = filesystem._StorageInfo(chunk.file.name, chunk.start, chunk.length)
            places[metadata.MetadataIndex(key, torch.Size(chunk.offsets))] = place
    for key in objects:
        entries[key] = metadata.BytesStorageMetadata()
        places[metadata.MetadataIndex(key)] = filesystem._StorageInfo(blob.file.name, blob.start, blob.length)
    with (folder / LIST).open("wb") as stream:
        pickle.dump(metadata.Metadata(entries, storage_data=places), stream)


def write_common(folder: Path, common: Mapping[str, Any]) -> None:
    """Writes what is no tensor, and the file that tells Megatron the format. Raises: OSError."""
    torch.save(dict(common), folder / COMMON)
    (folder / KIND).write_text(json.dumps(_KIND), encoding="utf-8")


def read_header(folder: Path) -> dict[str, Any] | None:
    """What `write_common` was given as "header", or a run's checkpoint says of itself.

    None where another program wrote the file, with no header, or with objects that are not let in.
    Raises: CheckpointError naming a file that is missing or damaged.
    """
    try:
        common = torch.load(folder / COMMON, weights_only=True)
    except pickle.UnpicklingError:
        return None
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError("cannot read the file", where=str(folder / COMMON), got=str(error).partition("\n")[0]) from error
    header = common.get("header") if isinstance(common, dict) else None
    return header if isinstance(header, dict) else None
