"""HF directories, one rectangle or one tensor at a time: nothing here holds a model, or even a shard, in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.files import refusal
from megatron_rpp.input_file import read_object
from megatron_rpp.weights.raw_file import RawFile, payload, read_rect
from megatron_rpp.weights.rect import Rect, Shape, as_matrix
from megatron_rpp.weights.safetensors_file import Entry, read_header, write_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# What a directory needs besides its weights: config, generation config, tokenizer, chat template, remote code, licence.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")


class HFCheckpoint:
    """The tensors of an HF directory, read by rectangle. Made by `open_hf`; use as a context manager or close it.

    config: config.json as a dict. entries: name -> file, dtype and shape of each tensor.
    """

    def __init__(self, folder: Path, config: dict[str, Any], entries: dict[str, Entry]) -> None:
        self.dir, self.config, self.entries = folder, config, entries
        self._file = RawFile()

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file that was read last. Reading again opens it again."""
        self._file.close()

    def check(self, shapes: Mapping[str, Shape], ignored: tuple[str, ...] = ()) -> None:
        """Raises CheckpointError unless the directory holds exactly these tensors in these shapes.

        ignored: endings of names that may be there as well.
        """
        in_fp8 = next((name for name, entry in self.entries.items() if name in shapes and entry.dtype == torch.float8_e4m3fn), None)
        if in_fp8 is not None:
            fix = "convert it with tools/convert_hf_to_megatron.py, and back with tools/convert_megatron_to_hf.py"
            raise CheckpointError(f"{in_fp8} is in FP8", where=str(self.dir), expected="numbers that need no scales", fix=fix)
        extra = sorted(name for name in self.entries.keys() - shapes.keys() if not name.endswith(ignored or ("\0",)))
        missing = sorted(shapes.keys() - self.entries.keys())
        if missing:
            fix = "fetch the directory again, or the config.json that belongs to these weights"
            raise CheckpointError("missing tensors", where=str(self.dir), expected=_some(missing), fix=fix)
        if extra:
            files = sorted({self.entries[name].file.name for name in extra})
            raise CheckpointError(f"tensors that the model has no place for, in {', '.join(files)}", where=str(self.dir), got=_some(extra))
        for name, shape in shapes.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise CheckpointError(f"{name} has another shape", where=str(entry.file), expected=shape, got=entry.shape)

    def read(self, rect: Rect) -> Tensor:
        """The rectangle as [rows, cols] in the file's dtype. Only its bytes are read.

        Raises: CheckpointError when the directory has no such tensor, the rectangle leaves it, or the file changed meanwhile.
        """
        entry = self.entries.get(rect.hf)
        if entry is None:
            raise CheckpointError("no such tensor", where=str(self.dir), expected=rect.hf)
        rows, cols = as_matrix(entry.shape)
        if rect.row + rect.rows > rows or rect.col + rect.cols > cols:
            raise CheckpointError(f"{rect.hf} is too small", where=str(entry.file), expected=rect.span, got=entry.shape)
        try:
            return read_rect(self._file.stream(entry.file), entry.start, cols, rect, entry.dtype)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"cannot read {rect.hf}", where=str(entry.file), got=error) from error


def open_hf(folder: Path | str) -> HFCheckpoint:
    """Opens an HF directory, `model.safetensors` or sharded with an index, and reads every header.

    Raises: CheckpointError naming the file, and the tensor where one is to blame: missing or damaged config, index, shard or
    header; an index and shards that disagree.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    has_single, has_index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if has_single == has_index:
        got = f"both {SINGLE} and {INDEX}" if has_single else "neither"
        fix = "remove the stale one" if has_single else "convert the weights to safetensors"
        raise CheckpointError("one set of weights is needed", where=str(folder), expected=f"{SINGLE} or {INDEX}", got=got, fix=fix)
    entries = read_header(folder / SINGLE) if has_single else _read_shards(folder)
    return HFCheckpoint(folder, config, entries)


def has_weights(folder: Path) -> bool:
    """Whether a directory has safetensors: one file, or an index of several."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError naming the file."""
    return read_object(file, CheckpointError)


def _read_shards(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("no weight_map from names to files", where=str(index))
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        # An index comes from elsewhere and must not reach outside its directory.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError("not the name of a shard", where=str(index), got=file)
        for name, entry in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(f"{name} is in {file}", where=str(index), expected=weight_map.get(name, "not in any file"), got=file)
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise CheckpointError(f"{name} is not where the index says", where=str(folder / file), fix="fetch the directory again")
    return entries


def save_hf(
    folder: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    source: Path | str,
    own_dtypes: Mapping[str, torch.dtype] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes an HF directory from a stream of whole tensors in any order, holding one at a time.

    shapes: every tensor, in the order of the file. source: the HF directory whose config and tokenizer files are carried over;
    config.json gets the new dtype. own_dtypes: of the tensors that keep one whatever `dtype` is. All is written beside `folder`
    under another name and renamed when it is complete and on disk, so `folder` never holds half a model.
    Units: shard_bytes for each file; a larger tensor has one to itself.
    Raises: CheckpointError when `folder` exists, a tensor is unknown, doubled, missing or of another shape, or it cannot be
    written; OSError.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError("already exists", where=str(folder), fix="choose another directory or remove it")
    read_json(Path(source) / "config.json")  # fail before the first tensor, not after the last
    with _renamed_when_complete(folder) as unfinished:
        places = _create_shards(unfinished, shapes, {name: (own_dtypes or {}).get(name, dtype) for name in shapes}, shard_bytes)
        _write_tensors(places, tensors, folder)
        carry_over(Path(source), unfinished, dtype)


@contextmanager
def _renamed_when_complete(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unfinished-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's 0700 would hide the result from everyone else
        for file in unfinished.iterdir():
            flush(file)
        flush(unfinished)
        os.rename(unfinished, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Returns when a file, or the list of names of a folder, is on disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plan_files(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], shard_bytes: int) -> dict[str, dict[str, Shape]]:
    """File name -> the tensors that it gets, in order. Units: shard_bytes for each file; a larger tensor has one to itself."""
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Mapping[str, Shape]], dtypes: Mapping[str, torch.dtype]) -> None:
    """The index of a directory of several files; one file alone needs none. Raises: OSError."""
    if len(files) > 1:
        total = sum(math.prod(shape) * dtypes[name].itemsize for shard in files.values() for name, shape in shard.items())
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _create_shards(folder: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], shard_bytes: int) -> dict[str, Entry]:
    """Empty files with headers, and the index when there are several."""
    files = plan_files(shapes, dtypes, shard_bytes)
    places: dict[str, Entry] = {}
    for file, shard in files.items():
        places |= write_header(folder / file, shard, dtypes)
    write_index(folder, files, dtypes)
    return places


def _write_tensors(places: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    written: set[str] = set()
    for name, tensor in tensors:
        place = places.get(name)
        if place is None or name in written or tuple(tensor.shape) != place.shape:
            expected = "no such tensor" if place is None else "one copy of it" if name in written else place.shape
            raise CheckpointError(f"cannot write {name}", where=str(folder), expected=expected, got=tuple(tensor.shape))
        try:
            with place.file.open("r+b") as stream:
                stream.seek(place.start)
                stream.write(payload(tensor.detach().to(device="cpu", dtype=place.dtype).contiguous()))
        except OSError as error:
            raise CheckpointError(f"cannot write {name}", where=str(folder / place.file.name), got=refusal(error, folder)) from error
        written.add(name)
    if missing := sorted(places.keys() - written):
        raise CheckpointError("the stream of tensors ended early", where=str(folder), expected=_some(missing))


def carry_over(source: Path, folder: Path, dtype: torch.dtype, *, quantization: Mapping[str, Any] | None = None) -> None:
    """Copies what an HF directory needs besides weights; config.json gets the dtype and how the weights are quantised.

    Raises: CheckpointError, OSError.
    """
    for pattern in _CARRIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not file.name.endswith(".index.json") and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    config = read_json(folder / "config.json")
    # transformers 5 writes `dtype`, earlier ones `torch_dtype`; keep whichever the source has.
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
