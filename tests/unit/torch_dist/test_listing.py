"""The list of tensors is compared with the files, and every tensor is covered once."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.listing import Chunk, Stored, first_element, read_header, read_listing, write_common, write_list
from megatron_rpp.torch_dist.manifest import fingerprint, write_manifest
from tests.mcore.damaged import change_list, saved_bytes

WHOLE = torch.arange(24.0).view(4, 6)
BOXES = (((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 6)))  # offsets and sizes of three chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor in three chunks, and of one object."""
    file = tmp_path / "__0_0.distcp"
    chunks, content = [], b""
    for (row, col), (rows, cols) in BOXES:
        blob = saved_bytes(WHOLE[row : row + rows, col : col + cols].clone())
        chunks.append(Chunk((row, col), (rows, cols), file, len(content), len(blob)))
        content += blob
    blob = saved_bytes([None])
    file.write_bytes(content + blob)
    write_list(tmp_path, {"w": Stored(torch.float32, (4, 6), tuple(chunks))}, ["x"], Chunk((), (), file, len(content), len(blob)))
    write_common(tmp_path, {"header": {"format": 2}})
    return tmp_path


def test_a_list_is_read_as_it_was_written(folder: Path) -> None:
    listing = read_listing(folder)
    stored = listing.tensors["w"]
    assert (stored.dtype, stored.shape, [(chunk.offsets, chunk.sizes) for chunk in stored.chunks]) == (torch.float32, (4, 6), list(BOXES))
    assert list(listing.objects) == ["x"]
    with (folder / "__0_0.distcp").open("rb") as stream:
        start = first_element(stream, stored.chunks[2], "w", torch.float32)
        stream.seek(start)
        assert stream.read(48) == WHOLE[2:].numpy().tobytes()


def tensor(found: Any) -> Any:
    return found.state_dict_metadata["w"]


def place(found: Any) -> Any:
    return next(iter(found.storage_data.values()))


def set_offsets(found: Any, number: int, offsets: tuple[int, ...]) -> None:
    """Move a chunk and its place."""
    chunk = tensor(found).chunks[number]
    index = next(index for index in found.storage_data if index.offset == chunk.offsets)
    where = found.storage_data.pop(index)
    chunk.offsets = torch.Size(offsets)
    found.storage_data[type(index)("w", torch.Size(offsets))] = where


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "one part twice": (lambda m: set_offsets(m, 1, (0, 2)), "w is not whole"),
    "one part in another": (lambda m: set_offsets(m, 1, (1, 3)), "w is not whole"),
    "a part outside": (lambda m: set_offsets(m, 1, (0, 4)), "a part outside its shape"),
    "a part is missing": (lambda m: tensor(m).chunks.pop(), "w is not whole"),
    "terabytes": (lambda m: setattr(tensor(m), "size", torch.Size([2**40, 2**40])), "w is not whole"),
    "another number of axes": (lambda m: setattr(tensor(m), "size", torch.Size([24])), "a part outside its shape"),
    "no size": (lambda m: setattr(tensor(m), "size", None), "size is not of type tuple"),
    "no chunks": (lambda m: setattr(tensor(m), "chunks", None), "chunks is not of type list"),
    "a dtype of no weights": (lambda m: setattr(tensor(m).properties, "dtype", torch.complex64), "torch.complex64"),
    "a start before the file": (lambda m: setattr(place(m), "offset", -1), "ends after the file does"),
    "a start after the file": (lambda m: setattr(place(m), "offset", 2**62), "ends after the file does"),
    "a length of text": (lambda m: setattr(place(m), "length", "9"), "length is not of type int"),
    "a length of True": (lambda m: setattr(place(m), "length", True), "length is not of type int"),
    "a file elsewhere": (lambda m: setattr(place(m), "relative_path", "../x"), "has no file"),
    "a file with a NUL": (lambda m: setattr(place(m), "relative_path", "x\0"), "has no file"),
    "the folder itself": (lambda m: setattr(place(m), "relative_path", ".."), "has no file"),
    "no such file": (lambda m: setattr(place(m), "relative_path", "x"), "cannot read w"),
    "a compressed blob": (lambda m: setattr(place(m), "transform_descriptors", ["zstd"]), "has no file"),
    "no place": (lambda m: m.storage_data.clear(), "has no file|more chunks than"),
    "no entries": (lambda m: setattr(m, "state_dict_metadata", []), "state_dict_metadata is not of type dict"),
    "a number for a tensor": (lambda m: m.state_dict_metadata.update(w=3), "an entry for 'w' of type int"),
    "a number for a name": (lambda m: m.state_dict_metadata.update({3: tensor(m)}), "an entry for 3"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_list_that_does_not_fit_its_files_is_refused(what: str, folder: Path) -> None:
    change, words = WRONG[what]
    change_list(folder, change)
    with pytest.raises(CheckpointError, match=words):
        read_listing(folder)


def test_a_list_of_something_else_is_refused(folder: Path) -> None:
    for value in ({}, [], None, torch.Size([3])):
        (folder / ".metadata").write_bytes(pickle.dumps(value))
        with pytest.raises(CheckpointError, match="not a list of tensors"):
            read_listing(folder)


@pytest.mark.parametrize("kind", [None, [], {}, {"sharded_backend": "zarr", "sharded_backend_version": 1}, {"x": 1}, "[" * 10**5])
def test_another_format_is_refused(kind: Any, folder: Path) -> None:
    (folder / "metadata.json").write_text(kind if isinstance(kind, str) else json.dumps(kind))
    with pytest.raises(CheckpointError, match=r"metadata\.json: (another format|cannot read the file as JSON)"):
        read_listing(folder)


def test_a_list_of_files_is_compared_where_there_is_one(folder: Path) -> None:
    """Megatron-LM writes none."""
    files = [path for path in folder.iterdir() if path.is_file()]
    write_manifest(folder, {path.name: fingerprint(path) for path in files})
    read_listing(folder)
    with (folder / "__0_0.distcp").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        read_listing(folder)
    (folder / "files.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a list of files"):
        read_listing(folder)


@pytest.mark.parametrize(
    ("common", "header"),
    [({"header": {"format": 2}}, {"format": 2}), ({"args": Path("x"), "iteration": 3}, None), ({"iteration": 3}, None)],
)
def test_the_header_is_read_without_letting_objects_in(tmp_path: Path, common: Any, header: Any) -> None:
    torch.save(common, tmp_path / "common.pt")
    assert read_header(tmp_path) == header


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_header_that_cannot_be_read_names_its_file(tmp_path: Path, damage: str) -> None:
    torch.save({"header": {}}, tmp_path / "common.pt")
    os.truncate(tmp_path / "common.pt", 300) if damage == "cut" else (tmp_path / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common\.pt: (there is no such file|the file is not what torch\.save writes)"):
        read_header(tmp_path)


@pytest.mark.parametrize("common", [[1], None, 3, {"header": 3}, {"header": {"model": torch.zeros(2)}}, {"header": {"model": [Path("x")]}}])
def test_a_common_part_of_another_type_is_refused(common: Any, tmp_path: Path) -> None:
    torch.save(common, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: (not the common part|the header is not a dict of plain values)"):
        read_header(tmp_path)
