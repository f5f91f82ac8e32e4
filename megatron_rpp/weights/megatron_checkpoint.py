"""A Megatron checkpoint seen as the HF tensors that it holds, read by rectangle, whatever layout wrote it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.listing import Chunk, Stored, first_element, read_listing
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.megatron_keys import Place, has_experts, places
from megatron_rpp.weights.raw_file import RawFile, read_rect
from megatron_rpp.weights.rect import Rect, Shape, as_matrix

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What Megatron keeps under keys of its own beside the model's weights.
HEAD_KEY = "output_layer.weight"
_NO_WEIGHTS = ("optimizer.", "chained_", "rng_state")


@dataclass(frozen=True, slots=True)
class Held:
    """Shape and dtype of one HF tensor."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Part:
    """A block of an HF tensor: rows from `row` on of a place's matrix."""

    rect: Rect
    place: Place
    row: int


class MegatronCheckpoint:
    """The HF tensors of a Megatron checkpoint. Made by `open_megatron`; use as a context manager or close it.

    entries: name -> shape and dtype. dir, model: what it was opened with.
    """

    def __init__(self, folder: Path, model: Model, stored: Mapping[str, Stored], found: Iterable[Place]) -> None:
        self.dir, self.model, self._stored = folder, model, stored
        self._parts: defaultdict[str, list[_Part]] = defaultdict(list)
        self._starts: dict[Chunk, int] = {}
        self._file = RawFile()
        self.entries: dict[str, Held] = {}
        for place in found:
            row = 0
            for block in place.parameter.blocks:
                self._parts[block.hf].append(_Part(block, place, row))
                self.entries[block.hf] = Held(model.hf_shapes[block.hf], stored[place.key].dtype)
                row += block.rows

    def __enter__(self) -> MegatronCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file that was read last. Reading again opens it again."""
        self._file.close()

    def read(self, rect: Rect) -> Tensor:
        """The rectangle as [rows, cols] in the checkpoint's dtype. Only its bytes are read.

        Raises: CheckpointError when there is no such tensor, a blob is not the tensor that the list says, or a file changed.
        """
        if rect.hf not in self.entries:
            raise CheckpointError("no such tensor", where=str(self.dir), expected=rect.hf)
        taken = torch.empty(rect.rows, rect.cols, dtype=self.entries[rect.hf].dtype)
        filled = 0
        for part in self._parts[rect.hf]:
            common = part.rect.intersect(rect)
            for chunk in self._stored[part.place.key].chunks if common is not None else ():
                inside = _inside(part, common, chunk)
                if inside is not None:
                    row, col = inside.row - rect.row, inside.col - rect.col
                    taken[row : row + inside.rows, col : col + inside.cols] = self._read(part, inside, chunk)
                    filled += inside.area
        if filled != rect.area:
            got = f"{filled} of {rect.area} elements"
            raise CheckpointError(f"{rect.span} is not there once", where=str(self.dir), got=got, fix="take another checkpoint")
        return taken

    def _read(self, part: _Part, inside: Rect, chunk: Chunk) -> Tensor:
        place, lead = part.place, len(part.place.index)
        dtype = self._stored[place.key].dtype
        rows, cols = as_matrix(chunk.sizes[lead:])
        top, left = as_matrix_offset(chunk.offsets[lead:])
        local = Rect(inside.hf, part.row + inside.row - part.rect.row - top, inside.col - part.rect.col - left, inside.rows, inside.cols)
        number = 0
        for axis in range(lead):
            number = number * chunk.sizes[axis] + place.index[axis] - chunk.offsets[axis]
        try:
            stream = self._file.stream(chunk.file)
            if chunk not in self._starts:
                self._starts[chunk] = first_element(stream, chunk, place.key, dtype)
            return read_rect(stream, self._starts[chunk] + number * rows * cols * dtype.itemsize, cols, local, dtype)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"cannot read {inside.hf} from {place.key}", where=str(chunk.file), got=error) from error


def as_matrix_offset(offsets: Shape) -> tuple[int, int]:
    """(row, column) of a box in a vector or matrix."""
    return (offsets[0], offsets[1]) if len(offsets) == 2 else (offsets[0], 0)


def _inside(part: _Part, common: Rect, chunk: Chunk) -> Rect | None:
    """What of `common`, in HF coordinates, lies in a chunk of the part's tensor."""
    lead = len(part.place.index)
    for axis, number in enumerate(part.place.index):
        if not chunk.offsets[axis] <= number < chunk.offsets[axis] + chunk.sizes[axis]:
            return None
    (rows, cols), (row, col) = as_matrix(chunk.sizes[lead:]), as_matrix_offset(chunk.offsets[lead:])
    row, col = row - part.row + part.rect.row, col + part.rect.col
    first_row, first_col = max(row, common.row), max(col, common.col)
    num_rows = min(row + rows, common.row + common.rows) - first_row
    num_cols = min(col + cols, common.col + common.cols) - first_col
    return Rect(common.hf, first_row, first_col, num_rows, num_cols) if num_rows > 0 and num_cols > 0 else None


def open_megatron(folder: Path | str, model: Model) -> MegatronCheckpoint:
    """Opens a torch_dist checkpoint as the HF tensors of `model`, its optimizer state left aside.

    Raises: CheckpointError naming the tensor when keys are missing or have no place in the model, a shape is another, or the
    directory is damaged.
    """
    folder = Path(folder)
    stored = read_listing(folder).tensors
    weights = {key for key in stored if not key.startswith(_NO_WEIGHTS)}
    wanted = list(places(model))
    if not {place.key for place in wanted} <= weights and has_experts(model):
        # Megatron run with a single number as moe_layer_freq keeps layers with experts in one tensor as well.
        stacked = list(places(model, by_layer=False))
        wanted = stacked if {place.key for place in stacked} <= weights else wanted
    keys = {place.key for place in wanted}
    if missing := sorted(keys - weights):
        fix = "give the config.json of the model that was saved"
        if missing == [HEAD_KEY]:
            fix = f'{fix}; if the embedding is its head, set "tie_word_embeddings": true'
        raise CheckpointError("missing tensors", where=str(folder), expected=_some(missing), fix=fix)
    if extra := sorted(weights - keys):
        fix = None
        if extra == [HEAD_KEY]:
            fix = 'config.json ties the head to the embedding; to keep this head, set "tie_word_embeddings": false'
        raise CheckpointError("tensors that the model has no place for", where=str(folder), got=_some(extra), fix=fix)
    for place in wanted:
        if (dtype := stored[place.key].dtype) not in _DTYPES:
            raise CheckpointError(f"{place.key} is of another dtype", where=str(folder), expected=_DTYPES, got=dtype)
        _check_shape(folder, place, stored[place.key].shape)
    return MegatronCheckpoint(folder, model, stored, wanted)


def _check_shape(folder: Path, place: Place, got: Shape) -> None:
    expected = (*place.lead, *place.matrix)
    rows_axis = len(place.lead)
    is_padded = place.parameter.is_vocab and len(got) == len(expected) and got[rows_axis] > expected[rows_axis]
    if got != expected and not (is_padded and math.prod(got) // got[rows_axis] == math.prod(expected) // expected[rows_axis]):
        fix = "give the config.json of the model that was saved"
        raise CheckpointError(f"{place.key} has another shape", where=str(folder), expected=expected, got=got, fix=fix)


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
