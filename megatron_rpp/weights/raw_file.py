"""Matrices inside files, read without mapping the file: what is asked for is what takes memory, and address space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_rpp.weights.rect import Rect, Shape, as_matrix

BLOCK_BYTES = 64 * 2**20
# Below a page the kernel reads what lies between the wanted columns anyhow; one call for many rows is then the quicker way.
_PAGE = 4096


class RawFile:
    """The file that was read last stays open: readers go through a model in order, and so do its files."""

    def __init__(self) -> None:
        self._open: tuple[Path, BinaryIO] | None = None

    def stream(self, file: Path) -> BinaryIO:
        """The open file. Raises: OSError."""
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = (file, file.open("rb", buffering=0))
        return self._open[1]

    def close(self) -> None:
        """Reading again opens again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def read_rect(stream: BinaryIO, start: int, width: int, rect: Rect, dtype: torch.dtype) -> Tensor:
    """A rectangle of a matrix that lies in a file row by row, `width` elements each, from byte `start`.

    Shapes: -> [rect.rows, rect.cols]. Raises: EOFError when the file ends before it; OSError.
    """
    taken, size = torch.empty(rect.rows, rect.cols, dtype=dtype), dtype.itemsize
    if rect.cols == width:
        _fill(stream, start + rect.row * width * size, taken)
    elif rect.cols * size >= _PAGE:
        for number, row in enumerate(taken):
            _fill(stream, start + ((rect.row + number) * width + rect.col) * size, row)
    else:
        for block in row_blocks(rect.hf, (rect.rows, width), size, limit=BLOCK_BYTES // 8):
            rows = read_rect(stream, start, width, Rect(rect.hf, rect.row + block.row, 0, block.rows, width), dtype)
            taken[block.row : block.row + block.rows] = rows[:, rect.col : rect.col + rect.cols]
    return taken


def row_blocks(name: str, shape: Shape, itemsize: int, *, limit: int = BLOCK_BYTES) -> Iterator[Rect]:
    """A tensor in runs of whole rows of at most `limit` bytes, or one row."""
    rows, cols = as_matrix(shape)
    step = max(1, limit // (cols * itemsize))
    for row in range(0, rows, step):
        yield Rect(name, row, 0, min(step, rows - row), cols)


def payload(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy())


def _fill(stream: BinaryIO, start: int, tensor: Tensor) -> None:
    wanted = payload(tensor)
    stream.seek(start)
    while len(wanted):
        got = stream.readinto(wanted)  # the kernel may hand over less than was asked for, 2 GiB at most
        if not got:
            raise EOFError(f"{len(wanted)} bytes are missing at its end")
        wanted = wanted[got:]
