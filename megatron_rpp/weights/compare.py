"""Two checkpoints, bit against bit, a block of one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rpp.weights.raw_file import BLOCK_BYTES, row_blocks
from megatron_rpp.weights.rect import Rect, Shape

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tick = Callable[[str, int], None]  # what is being done, and how many bytes more of it are done


class Described(Protocol):
    """Shape and dtype of a tensor that is not in memory."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Source(Protocol):
    """HF tensors, wherever they are kept: HFCheckpoint and MegatronCheckpoint."""

    @property
    def entries(self) -> Mapping[str, Described]: ...

    def read(self, rect: Rect) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the tensors of a source."""

    entries: Mapping[str, Described]
    read: Callable[[Rect], Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference. left, right: what stands there in each."""

    tensor: str
    what: str
    left: object
    right: object


def compare(
    left: Source,
    right: Source,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    tick: Tick | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Difference | None:
    """The first difference in the order of `left`, None where there is none: names, shapes, dtypes, then every bit.

    dtypes: what the tensors of `left` are cast to before they are compared. None: nothing.
    Units: block_bytes of each side are in memory at a time. Raises: what reading raises.
    """
    for name in (*left.entries, *right.entries):
        if name not in left.entries or name not in right.entries:
            return Difference(name, "the tensor", *("there" if name in side.entries else "missing" for side in (left, right)))
    for name, entry in left.entries.items():
        other, dtype = right.entries[name], (dtypes or {}).get(name, entry.dtype)
        if entry.shape != other.shape:
            return Difference(name, "the shape", entry.shape, other.shape)
        if dtype != other.dtype:
            return Difference(name, "the dtype", dtype, other.dtype)
    for name, entry in left.entries.items():
        dtype = (dtypes or {}).get(name, entry.dtype)
        for block in row_blocks(name, entry.shape, entry.dtype.itemsize, limit=block_bytes):
            found = _first(block, left.read(block).to(dtype), right.read(block), entry.shape)
            if found is not None:
                return found
            if tick is not None:
                tick("compare", block.area * dtype.itemsize)
    return None


def _first(block: Rect, left: Tensor, right: Tensor, shape: Shape) -> Difference | None:
    # As integers: a not-a-number equals itself, and -0.0 is not 0.0.
    kind = _INTEGERS[left.element_size()]
    unequal = left.view(kind) != right.view(kind)
    if not unequal.any():
        return None
    row, col = divmod(int(unequal.flatten().to(torch.uint8).argmax()), block.cols)
    at = f"[{block.row + row}, {block.col + col}]" if len(shape) == 2 else f"[{block.row + row}]"
    return Difference(block.hf, f"element {at}", left[row, col].item(), right[row, col].item())
