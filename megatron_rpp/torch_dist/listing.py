"""Where the tensors and objects of a torch_dist checkpoint lie. It needs no megatron and no process group.

Every box and every range is compared with the tensor and the file that it lies in before anything is read.
Source: torch.distributed.checkpoint (filesystem.py, metadata.py) and megatron.core.dist_checkpointing,
format "torch_dist" 1.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.blob import Blob, Span
from megatron_rpp.torch_dist.manifest import MANIFEST, check_size, read_json_file, read_manifest
from megatron_rpp.torch_dist.pickles import FETCH, Record, is_plain, shortened, unpickle

LIST, COMMON, KIND = ".metadata", "common.pt", "metadata.json"
_KIND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the blob that holds it. start, length: of the blob in the file, in bytes."""

    offsets: Sizes
    sizes: Sizes
    file: Path
    start: int
    length: int

    @property
    def span(self) -> Span:
        """The blob's place."""
        return Span(self.file, self.start, self.length)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor over all its chunks, which together cover it once."""

    dtype: torch.dtype
    shape: Sizes
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything in a checkpoint's .distcp files: tensors and objects by key."""

    folder: Path
    tensors: Mapping[str, Stored]
    objects: Mapping[str, Span]


def is_torch_dist(folder: Path) -> bool:
    """Whether this is a directory of the kind. Raises nothing."""
    return (folder / LIST).is_file()


def read_listing(folder: Path) -> Listing:
    """Every tensor and object of a checkpoint by its key, optimizer state included.

    Raises: CheckpointError naming the file, and the key where one is to blame: no list, not a list, a
    pickle that names more than data, another format, chunks that leave their tensor or do not cover it
    once, a blob that is missing or reaches past the end of its file, and files that differ in name or size
    from those of files.json where there is one.
    """
    if (folder / MANIFEST).exists():  # Megatron-LM writes none
        for name, recorded in read_manifest(folder).items():
            check_size(folder / name, recorded)
    if (kind := read_json_file(folder / KIND)) != _KIND:
        raise CheckpointError("another format", where=str(folder / KIND), expected=_KIND, got=shortened(str(kind)))
    file = folder / LIST
    found = unpickle(_content(file), where=str(file))
    if not isinstance(found, Record) or found.kind != "Metadata":
        raise CheckpointError("not a list of tensors", where=str(file), got=type(found).__name__, fix=FETCH)
    try:
        return _Reader(folder, found.field("state_dict_metadata", dict), found.field("storage_data", dict)).listing()
    except ValueError as error:
        raise CheckpointError("not a list of tensors", where=str(file), got=shortened(str(error)), fix=FETCH) from error


def _content(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise CheckpointError("there is no such file", where=str(file), fix=FETCH)
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError("cannot read the file", where=str(file), got=error) from error


class _Reader:
    """The list of a directory, checked against its files."""

    def __init__(self, folder: Path, entries: dict[Any, Any], places: dict[Any, Any]) -> None:
        self.folder, self.entries, self.places = folder, entries, places
        self.file_bytes: dict[str, int] = {}
        self.num_chunks = 0

    def listing(self) -> Listing:
        """Raises: CheckpointError; ValueError for an entry that no list holds."""
        tensors: dict[str, Stored] = {}
        objects: dict[str, Span] = {}
        for key, entry in self.entries.items():
            if type(key) is not str or not isinstance(entry, Record):
                raise ValueError(f"an entry for {key!r} of type {type(entry).__name__}")
            if entry.kind == "TensorStorageMetadata":
                tensors[key] = self._stored(shortened(key), key, entry)
            elif entry.kind == "BytesStorageMetadata":
                objects[key] = self._span(shortened(key), (key, None))
            else:
                raise ValueError(f"an entry for {key!r} of type {entry.kind}")
        return Listing(self.folder, tensors, objects)

    def _stored(self, name: str, key: str, entry: Record) -> Stored:
        properties, shape, boxes = entry.field("properties", Record).state, entry.field("size", tuple), entry.field("chunks", list)
        dtype = properties[0] if type(properties) is tuple and properties else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no dtype for {name}")
        self.num_chunks += len(boxes)
        if self.num_chunks > max(len(self.places), 1):
            raise ValueError(f"more chunks than the {len(self.places)} places that it names")
        chunks = []
        for box in boxes:
            if not isinstance(box, Record):
                raise ValueError(f"a chunk of {name} is of type {type(box).__name__}")
            offsets, sizes = box.field("offsets", tuple), box.field("sizes", tuple)
            span = self._span(f"{name} {list(offsets)}", (key, offsets))
            if not len(sizes) == len(offsets) == len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
                what, got = f"{name} has a part outside its shape", f"{sizes} at {offsets}"
                raise CheckpointError(what, where=str(span.file), expected=f"inside {shape}", got=got)
            chunks.append(Chunk(offsets, sizes, span.file, span.start, span.length))
        held, wanted = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
        if held != wanted or (twice := _overlap(chunks)) is not None:
            got = f"{held} elements" if held != wanted else f"two parts at {list(twice)}"
            raise CheckpointError(
                f"{name} is not whole", where=str(self.folder / LIST), expected=f"{wanted} elements once", got=got, fix=FETCH
            )
        return Stored(dtype, shape, tuple(chunks))

    def _span(self, name: str, index: tuple[str, Sizes | None]) -> Span:
        place = self.places.get(index)
        if not isinstance(place, Record):
            raise CheckpointError(f"{name} has no file", where=str(self.folder / LIST), expected="a file here", got="nowhere", fix=FETCH)
        file, start, length = place.field("relative_path", str), place.field("offset", int), place.field("length", int)
        if file in ("", ".", "..") or "/" in file or "\0" in file or place.state.get("transform_descriptors"):
            raise CheckpointError(
                f"{name} has no file", where=str(self.folder / LIST), expected="a file here", got=shortened(file), fix=FETCH
            )
        if file not in self.file_bytes:
            try:
                self.file_bytes[file] = (self.folder / file).stat().st_size if (self.folder / file).is_file() else -1
            except OSError as error:
                raise CheckpointError(f"cannot read {name}", where=str(self.folder / file), got=error, fix=FETCH) from error
        size = self.file_bytes[file]
        if size < 0:
            raise CheckpointError(f"cannot read {name}", where=str(self.folder / file), got="no such file", fix=FETCH)
        if start < 0 or length < 0 or start + length > size:
            what, expected = f"{name} ends after the file does", f"{start + length} bytes"
            raise CheckpointError(what, where=str(self.folder / file), expected=expected, got=size, fix=FETCH)
        return Span(self.folder / file, start, length)


def _overlap(chunks: Sequence[Chunk]) -> Sizes | None:
    """The offsets of a chunk that another one overlaps, None where there is none.

    Sweeps along the axis with the most cuts.
    """
    if len(chunks) < 2 or not chunks[0].sizes:
        return chunks[0].offsets if len(chunks) > 1 else None
    axis = max(range(len(chunks[0].sizes)), key=lambda axis: len({chunk.offsets[axis] for chunk in chunks}))
    open_chunks: list[Chunk] = []
    for chunk in sorted((chunk for chunk in chunks if math.prod(chunk.sizes)), key=lambda chunk: chunk.offsets[axis]):
        open_chunks = [one for one in open_chunks if one.offsets[axis] + one.sizes[axis] > chunk.offsets[axis]]
        if any(_do_overlap(one, chunk) for one in open_chunks):
            return chunk.offsets
        open_chunks.append(chunk)
    return None


def _do_overlap(left: Chunk, right: Chunk) -> bool:
    axes = zip(left.offsets, left.sizes, right.offsets, right.sizes, strict=True)
    return all(a < b + num_b and b < a + num_a for a, num_a, b, num_b in axes)


def first_element(stream: BinaryIO, chunk: Chunk, key: str, dtype: torch.dtype) -> int:
    """Where in the chunk's file its first element lies; the others follow in C order.

    Raises: CheckpointError naming the file and the tensor when the blob is not one tensor of that shape and
    dtype; OSError.
    """
    what = f"{key} {list(chunk.offsets)}"
    blob = Blob(stream, chunk.span, what)
    piece = blob.tensor()
    expected = (dtype, chunk.sizes, True)
    if (got := (piece.dtype, piece.shape, piece.is_contiguous)) != expected:
        raise CheckpointError(f"{what} is another tensor", where=str(chunk.file), expected=expected, got=got, fix=FETCH)
    return blob.first_byte(piece)


def read_common(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint that belongs to no rank. Raises: CheckpointError naming the file."""
    file = folder / COMMON
    try:
        if not file.is_file():
            raise CheckpointError("there is no such file", where=str(file), fix=FETCH)
        with file.open("rb") as stream:
            found = Blob(stream, Span(file, 0, file.stat().st_size), "the file").value()
    except OSError as error:
        raise CheckpointError("cannot read the file", where=str(file), got=error) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            "not the common part of a checkpoint", where=str(file), expected="a dict", got=type(found).__name__, fix=FETCH
        )
    return found


def read_header(folder: Path) -> dict[str, Any] | None:
    """What `write_common` was given as "header", or a run's checkpoint says of itself. None where another
    program wrote the file.

    Raises: CheckpointError naming a file that is missing, damaged, or names more than data.
    """
    return header_of(read_common(folder), folder)


def header_of(common: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The header in the common part; None where there is none.

    Raises: CheckpointError when it is more than plain values.
    """
    header = common.get("header")
    if header is not None and (not isinstance(header, dict) or not is_plain(header)):
        raise CheckpointError("the header is not a dict of plain values", where=str(folder / COMMON), fix=FETCH)
    return header


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
