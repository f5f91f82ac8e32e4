"""Rectangles of Hugging Face (HF) tensors: the one language in which every layout of the weights is written.

HF names and shapes are the canonical coordinates. A tensor that lives on some rank is a `Local`; its `Piece`s say which
rectangle of which HF tensor sits where in it. A 1-D tensor is a matrix with one column. Whatever no piece covers
(rows that pad the vocabulary) belongs to no HF tensor and never moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.errors import GeometryError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rect:
    """Rows [row, row + rows) and columns [col, col + cols) of the HF tensor `hf`."""

    hf: str
    row: int
    col: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if min(self.row, self.col) < 0 or min(self.rows, self.cols) < 1:
            raise GeometryError("an empty or negative rectangle", where=self.hf, got=self.span)

    @property
    def area(self) -> int:
        """Elements, not bytes."""
        return self.rows * self.cols

    @property
    def span(self) -> str:
        """The rectangle as a slice expression, for messages."""
        return f"{self.hf}[{self.row}:{self.row + self.rows}, {self.col}:{self.col + self.cols}]"

    def intersect(self, other: Rect) -> Rect | None:
        """The common part, or None when there is none (other tensor, or disjoint)."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        if self.hf != other.hf or rows <= 0 or cols <= 0:
            return None
        return Rect(self.hf, row, col, rows, cols)


@dataclass(frozen=True, slots=True)
class Piece:
    """`rect` of an HF tensor, stored at (row, col) of the matrix that the leading `index` picks from the local tensor."""

    rect: Rect
    row: int = 0
    col: int = 0
    index: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Local:
    """One tensor of one rank: its name there, its shape and dtype, and the HF rectangles it holds."""

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in self.pieces:
            rows, cols = as_matrix(self.shape[len(piece.index) :])
            fits = piece.row + piece.rect.rows <= rows and piece.col + piece.rect.cols <= cols
            if not fits or any(i >= size for i, size in zip(piece.index, self.shape, strict=False)):
                raise GeometryError("a piece does not fit", where=self.name, expected=f"inside {self.shape}", got=piece)
        # The same check as for HF tensors, in local coordinates: two pieces may not claim one element.
        placed = (Rect(f"{self.name}{list(p.index)}", p.row, p.col, p.rect.rows, p.rect.cols) for p in self.pieces)
        check_disjoint(placed)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, padding included."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_padding(self) -> bool:
        """True when some elements belong to no HF tensor."""
        return sum(piece.rect.area for piece in self.pieces) < math.prod(self.shape)


def as_matrix(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a 1-D or 2-D shape. Raises: GeometryError for any other."""
    if len(shape) not in (1, 2):
        raise GeometryError("only vectors and matrices can be cut into rectangles", got=shape)
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def view(tensor: Tensor, piece: Piece, rect: Rect) -> Tensor:
    """The elements of `rect` (a part of piece.rect) inside the local tensor, as a view [rect.rows, rect.cols]."""
    for i in piece.index:
        tensor = tensor[i]
    matrix = tensor if tensor.dim() == 2 else tensor[:, None]
    row, col = piece.row + rect.row - piece.rect.row, piece.col + rect.col - piece.rect.col
    return matrix[row : row + rect.rows, col : col + rect.cols]


def check_disjoint(rects: Iterable[Rect]) -> None:
    """Raises GeometryError naming two rectangles that share an element.

    Sorted by first row, a rectangle can only meet those that start before it ends, so the usual case (row blocks) is one
    comparison a rectangle.
    """
    ordered = sorted(rects, key=lambda r: (r.hf, r.row, r.col))
    for i, first in enumerate(ordered):
        for second in ordered[i + 1 :]:
            if second.hf != first.hf or second.row >= first.row + first.rows:
                break
            if first.intersect(second) is not None:
                raise GeometryError("two rectangles overlap", where=first.hf, got=f"{first.span} and {second.span}")


def check_partition(shapes: Mapping[str, Shape], rects: Iterable[Rect]) -> None:
    """Every element of every HF tensor lies in exactly one rectangle.

    Inside + disjoint + equal area = exact cover. Raises: GeometryError naming the tensor.
    """
    rects = list(rects)
    area = dict.fromkeys(shapes, 0)
    for rect in rects:
        if rect.hf not in shapes:
            raise GeometryError("a rectangle of an unknown HF tensor", where=rect.hf)
        rows, cols = as_matrix(shapes[rect.hf])
        if rect.row + rect.rows > rows or rect.col + rect.cols > cols:
            raise GeometryError("a rectangle leaves its tensor", where=rect.hf, expected=f"inside {shapes[rect.hf]}", got=rect.span)
        area[rect.hf] += rect.area
    check_disjoint(rects)
    for name, shape in shapes.items():
        rows, cols = as_matrix(shape)
        if area[name] != rows * cols:
            raise GeometryError("not covered", where=name, expected=f"{rows * cols} elements", got=area[name])
