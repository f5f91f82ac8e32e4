"""HF directory to Megatron checkpoint and back, in memory that does not grow with the model.

A directory in block FP8 is read as the wide model that it stands for (fp8_checkpoint.open_wide), and can be written.
Both ways the files are written one after the other, each tensor in blocks of rows, then everything is read again, from the
files, and compared with the source to the bit; only then does the result get its name. A run that was cut off is gone on with.

    <checkpoint>/__0_<n>.distcp .metadata common.pt metadata.json     Megatron's format, for a load in any layout
    <checkpoint>/files.json                                           name -> bytes and CRC-32 of those
    <checkpoint>/hf/                                                  config, tokenizer, generation config: the way back
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.files import refusal
from megatron_rpp.torch_dist.listing import COMMON, KIND, LIST, Chunk, Stored, write_common, write_list
from megatron_rpp.torch_dist.manifest import fingerprint, write_manifest
from megatron_rpp.weights.compare import Part, Source, Tick, compare
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.fp8_checkpoint import Quantised, quantization_config
from megatron_rpp.weights.hf_io import SHARD_BYTES, HFCheckpoint, carry_over, open_hf, plan_files, write_index
from megatron_rpp.weights.megatron_checkpoint import MegatronCheckpoint, open_megatron
from megatron_rpp.weights.megatron_keys import Place, places, state_keys
from megatron_rpp.weights.quantise import Scales
from megatron_rpp.weights.raw_file import BLOCK_BYTES, payload, row_blocks
from megatron_rpp.weights.rect import Rect, Shape
from megatron_rpp.weights.safetensors_file import WIDE_DTYPES, make_header
from megatron_rpp.weights.tied_head import HEAD, check_tied_head
from megatron_rpp.weights.unfinished import Unfinished

CARRIED = "hf"
_RETRY = "make room, then run the same command again: it goes on where it stopped"


@dataclass(frozen=True, slots=True)
class Options:
    """dtype: None keeps that of each tensor. fp8: the scales of an HF directory in block FP8, None for one that is not.
    tick: called after each block, with its bytes.

    Units: shard_bytes for each file of the result, block_bytes for each piece of a tensor that is in memory.
    """

    dtype: torch.dtype | None = None
    fp8: Scales | None = None
    overwrite: bool = False
    shard_bytes: int = SHARD_BYTES
    block_bytes: int = BLOCK_BYTES
    tick: Tick = lambda what, num_bytes: None


@dataclass(frozen=True, slots=True)
class Result:
    """tensors: HF tensors compared. num_bytes: of the weights. files: with weights; resumed_files: of an earlier run."""

    tensors: int
    num_bytes: int
    files: int
    resumed_files: int


@dataclass(frozen=True, slots=True)
class _Box:
    """Rows [row, row + rows) of a parameter: what becomes one chunk."""

    place: Place
    row: int
    rows: int
    dtype: torch.dtype

    @property
    def sizes(self) -> Shape:
        return (*(1 for _ in self.place.lead), self.rows, *self.place.matrix[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def chunk(self, file: Path, start: int, length: int) -> Chunk:
        offsets = (*self.place.index, self.row, *(0 for _ in self.place.matrix[1:]))
        return Chunk(offsets, self.sizes, file, start, length)


def to_megatron(source: HFCheckpoint, model: Model, out: Path, *, header: Mapping[str, Any], options: Options = Options()) -> Result:
    """Writes the weights of an HF directory as a torch_dist checkpoint without optimizer state.

    header: plain values for common.pt, by which a load can tell the model.
    Raises: CheckpointError when the source is not exactly the model's tensors in the dtype of its config, `out` exists, it
    cannot be written, or what was written is not what was read.
    """
    part = model_part(source, model)
    dtypes = hf_dtypes(source, model, options.dtype)
    files = _group([box for place in places(model) for box in _boxes(place, dtypes, options.block_bytes)], options.shard_bytes)
    job = _job("to Megatron", [*source.dir.iterdir()], dtypes, options, header)
    with _making(out, source.dir, job, options.overwrite) as work:
        spans: dict[str, list[list[int]]] = {}
        todo = _to_write(work, {name: sum(box.num_bytes for box in boxes) for name, boxes in files.items()}, spans, options.tick)
        for name in todo:
            with _naming(name, out / name), work.writing(name, spans.setdefault(name, [])) as stream:
                for box in files[name]:
                    with _naming(box.place.key, out / name):
                        start = stream.at
                        stream.write(_blob(_assemble(source, box)))
                        spans[name].append([start, stream.at - start])
                    options.tick("write", box.num_bytes)
        with _naming("the list of tensors", out):
            _finish_megatron(work, model, files, spans, header)
            carry_over(source.dir, _made(work.folder / CARRIED), options.dtype or _main(dtypes, model))
        with open_megatron(work.folder, model) as written:
            _check_equal(part, written, dtypes, out, options)
        with _naming("the list of files", out):
            others = {name: fingerprint(work.folder / name) for name in (LIST, COMMON, KIND)}
            write_manifest(work.folder, work.fingerprints | others)
            work.complete()
    return Result(len(dtypes), total_bytes(source, model, options.dtype), len(files), len(files) - len(todo))


def to_hf(source: MegatronCheckpoint, out: Path, *, carried: Path, options: Options = Options()) -> Result:
    """Writes the weights of a Megatron checkpoint as an HF directory. carried: where config and tokenizer come from.

    Raises: CheckpointError when `out` exists, it cannot be written, or what was written is not what was read; NumericsError for
    an element without an FP8 form.
    """
    model = source.model
    wanted, dtypes = as_written(source, model, options)
    shapes = {name: wanted.entries[name].shape for name in dtypes}
    files = plan_files(shapes, dtypes, options.shard_bytes)
    job = _job("to HF", [*source.dir.iterdir(), *carried.iterdir()], dtypes, options, None)
    with _making(out, source.dir, job, options.overwrite) as work:
        sizes = {file: sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shard.items()) for file, shard in files.items()}
        todo = _to_write(work, sizes, {}, options.tick)
        for file in todo:
            with _naming(file, out / file), work.writing(file, True) as stream:
                stream.write(make_header(out / file, files[file], dtypes)[0])
                for name, shape in files[file].items():
                    for block in row_blocks(name, shape, dtypes[name].itemsize, limit=options.block_bytes):
                        with _naming(name, out / file):
                            stream.write(payload(wanted.read(block).to(dtypes[name])))
                        options.tick("write", block.area * dtypes[name].itemsize)
        with _naming("the index", out):
            write_index(work.folder, files, dtypes)
            quantization = quantization_config(options.fp8) if options.fp8 else None
            carry_over(carried, work.folder, options.dtype or _main(dtypes, model), quantization=quantization)
        with open_hf(work.folder) as written:
            _check_equal(wanted, written, dtypes, out, options)
        with _naming("the last bytes", out):
            work.complete()
    return Result(len(dtypes), written_bytes(source, model, options), len(files), len(files) - len(todo))


def as_written(source: Source, model: Model, options: Options) -> tuple[Source, dict[str, torch.dtype]]:
    """The tensors of an HF directory in the order of its files, and what each is cast to."""
    own = model.hf_dtypes
    dtypes = {name: own.get(name, options.dtype or source.entries[name].dtype) for name in model.hf_shapes}
    if options.fp8 is None:
        return source, dtypes
    wanted = Quantised(source, model.hf_shapes, dtypes, options.fp8)
    return wanted, {name: entry.dtype for name, entry in wanted.entries.items()}


def written_bytes(source: Source, model: Model, options: Options) -> int:
    """Bytes of the tensors of the HF directory that `to_hf` writes."""
    wanted, dtypes = as_written(source, model, options)
    return sum(math.prod(wanted.entries[name].shape) * dtype.itemsize for name, dtype in dtypes.items())


def model_part(source: HFCheckpoint, model: Model) -> Source:
    """Of an HF directory the tensors of the model; others that nobody reads may lie beside them, but no unknown ones.

    Raises: as `HFCheckpoint.check`; CheckpointError for a tied model with a head of its own.
    """
    source.check(model.hf_shapes, (*model.ignored, *((HEAD,) if model.dims.is_tied else ())))
    check_tied_head(source, model)
    return Part({name: source.entries[name] for name in model.hf_shapes}, source.read)


def hf_dtypes(source: HFCheckpoint, model: Model, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """HF name -> the dtype it is converted to. dtype: None keeps what config.json says, which must be what the files hold.

    Raises: CheckpointError naming the file and the first tensor that is of another dtype, or config.json for an unknown one.
    """
    own, said = model.hf_dtypes, source.config.get("dtype") or source.config.get("torch_dtype")
    if said is None:
        usual = source.entries[model.embedding.blocks[0].hf].dtype
    elif (usual := getattr(torch, str(said).removeprefix("torch."), None)) not in WIDE_DTYPES.values():
        expected = [str(dtype).removeprefix("torch.") for dtype in WIDE_DTYPES.values()]
        raise CheckpointError("not a dtype of weights", where=str(source.dir / "config.json"), expected=expected, got=said)
    for name in model.hf_shapes if dtype is None else ():
        entry = source.entries[name]
        if entry.dtype != (wanted := own.get(name, usual)):
            what, fix = f"{name} is of another dtype than the model", "convert every tensor to one dtype with --dtype"
            raise CheckpointError(what, where=str(entry.file), expected=wanted, got=entry.dtype, fix=fix)
    return {name: own.get(name, dtype or usual) for name in model.hf_shapes}


def total_bytes(source: Source, model: Model, dtype: torch.dtype | None) -> int:
    """Bytes of the HF tensors of the model after conversion to `dtype`; None: as they are."""
    kinds = {name: model.hf_dtypes.get(name, dtype or source.entries[name].dtype) for name in model.hf_shapes if name in source.entries}
    return sum(math.prod(model.hf_shapes[name]) * kind.itemsize for name, kind in kinds.items())


def _main(dtypes: Mapping[str, torch.dtype], model: Model) -> torch.dtype:
    return dtypes[model.embedding.blocks[0].hf]


def _boxes(place: Place, dtypes: Mapping[str, torch.dtype], limit: int) -> Iterator[_Box]:
    dtype = place.parameter.dtype or dtypes[place.parameter.blocks[0].hf]
    for block in row_blocks(place.key, place.matrix, dtype.itemsize, limit=limit):
        yield _Box(place, block.row, block.rows, dtype)


def _group(boxes: Sequence[_Box], shard_bytes: int) -> dict[str, list[_Box]]:
    """File name -> what goes into it. Names as a rank 0 with several writers gives them."""
    groups: list[list[_Box]] = [[]]
    filled = 0
    for box in boxes:
        if groups[-1] and filled + box.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(box)
        filled += box.num_bytes
    return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}


def _assemble(source: HFCheckpoint, box: _Box) -> Tensor:
    """The box, of which no more is read from the source than it holds. Shapes: -> box.sizes."""
    blocks, cols = box.place.parameter.blocks, box.place.parameter.blocks[0].cols
    matrix, row = torch.empty(box.rows, cols, dtype=box.dtype), 0
    for block in blocks:
        first, last = max(row, box.row), min(row + block.rows, box.row + box.rows)
        if first < last:
            part = Rect(block.hf, block.row + first - row, block.col, last - first, cols)
            matrix[first - box.row : last - box.row] = source.read(part)
        row += block.rows
    return matrix.view(box.sizes)


def _blob(value: Any) -> bytes:
    """What `torch.save` writes. In memory, for on a full disk it raises something that hides the reason.

    getvalue() shares the buffer's memory as getbuffer() does. A traceback that holds a view from getbuffer() makes
    Python 3.12.1 crash at its next garbage collection (python/cpython issue 111049).
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _finish_megatron(
    work: Unfinished, model: Model, files: Mapping[str, list[_Box]], spans: Mapping[str, list[list[int]]], header: Mapping[str, Any]
) -> None:
    """The list of tensors, the objects and the header."""
    name = f"__0_{len(files)}.distcp"
    with work.writing(name, []) as stream:
        stream.write(_blob([None]))  # what a module without fp8 state keeps
    blob = Chunk((), (), work.folder / name, 0, work.fingerprints[name]["bytes"])
    chunks: dict[str, list[Chunk]] = {}
    kinds: dict[str, tuple[torch.dtype, Shape]] = {}
    for file, boxes in files.items():
        for box, (start, length) in zip(boxes, spans[file], strict=True):
            chunks.setdefault(box.place.key, []).append(box.chunk(work.folder / file, start, length))
            kinds[box.place.key] = (box.dtype, (*box.place.lead, *box.place.matrix))
    stored = {key: Stored(*kinds[key], tuple(found)) for key, found in chunks.items()}
    write_list(work.folder, stored, state_keys(model), blob)
    write_common(work.folder, {"header": dict(header)})


def _check_equal(source: Source, written: Source, dtypes: Mapping[str, torch.dtype], out: Path, options: Options) -> None:
    difference = compare(source, written, dtypes=dtypes, tick=options.tick, block_bytes=options.block_bytes)
    if difference is not None:
        what = f"{difference.tensor}: {difference.what} is not what was read"
        fix = "look for a failing disk, or a source that changed meanwhile"
        raise CheckpointError(what, where=str(out), expected=difference.left, got=difference.right, fix=fix)


@contextmanager
def _making(out: Path, source: Path, job: str, overwrite: bool) -> Iterator[Unfinished]:
    """The directory in the making; nothing that is read may be overwritten."""
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise CheckpointError("the source lies in it", where=str(out), got=source, fix="write to another directory")
    with _naming("the first file", out):
        work = Unfinished(here, job, overwrite=overwrite)
    with work:
        yield work


def _to_write(work: Unfinished, sizes: Mapping[str, int], notes: dict[str, Any], tick: Tick) -> list[str]:
    """The files that no earlier run finished; what was noted about the others goes into `notes`."""
    todo = []
    for name, size in sizes.items():
        found = work.finished(name)
        if found is None:
            todo.append(name)
        else:
            notes[name] = found
            tick("write", size)
    needed, free = sum(sizes[name] for name in todo), shutil.disk_usage(work.folder).free
    if needed > free:
        raise CheckpointError("the disk is too small", where=str(work.final), expected=f"{needed} bytes", got=f"{free} free", fix=_RETRY)
    return todo


@contextmanager
def _naming(what: str, file: Path) -> Iterator[None]:
    """An error of the disk says which tensor of which file it met."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {what}", where=str(file), got=refusal(error, file), fix=_RETRY) from error


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _job(what: str, files: Sequence[Path], dtypes: Mapping[str, torch.dtype], options: Options, header: Mapping[str, Any] | None) -> str:
    """A digest of everything that the result depends on: two runs with the same one write the same bytes."""
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    told = (what, stats, list(dtypes.items()), options.fp8, options.shard_bytes, options.block_bytes, header)
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
