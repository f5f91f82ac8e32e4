"""What a family says about one parameter, and about the model as a whole.

A parameter is a column of HF rectangles (its `blocks`, in the order in which one rank stores them) and a rule by which
tensor parallelism cuts it. The same words describe Megatron's parameters and SGLang's, for both do nothing else to HF
tensors. All of it is plain data, so two processes that read one config agree to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.families.dims import Dims
from megatron_rpp.weights.rect import Local, Piece, Rect, Shape

Split = Literal["none", "rows", "rows_of_each", "columns"]
Axis = Literal["attention", "dense"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter under its Megatron (Transformer Engine) name; layers and experts are counted over the whole model from 0.

    blocks: HF rectangles, stacked by rows when tp is 1. split: how tp ranks share the stack.
    none          every rank holds all of it
    rows          rank r holds the r-th run of rows of the whole stack (Megatron's QKV by KV group, embeddings)
    rows_of_each  rank r holds the r-th run of every block (gate and up; SGLang's Q, K and V)
    columns       rank r holds the r-th run of columns (attention output, down)

    is_vocab: the stack is padded below to the layout's padded vocabulary. dtype: None takes the layout's.
    expert: number of the routed expert; the ranks of expert parallelism share those, and expert-tp cuts each.
    heads: of each block of `rows_of_each`; a block with fewer heads than ranks is repeated (SGLang's K and V). () repeats none.
    over: SGLang's data-parallel attention cuts attention (and the embedding) into fewer parts than the rest.
    engine: how SGLang stores the same HF tensors. None: under the HF name, cut as here. Several parameters that go into one
    of SGLang's say so once: the others have ().
    """

    name: str
    blocks: tuple[Rect, ...]
    split: Split
    ndim: int = 2
    is_vocab: bool = False
    dtype: torch.dtype | None = None
    expert: int | None = None
    heads: tuple[int, ...] = ()
    over: Axis = "dense"
    engine: tuple[Parameter, ...] | None = None

    def local(self, tp_rank: int, tp_size: int, *, dtype: torch.dtype, padded_vocab: int) -> Local:
        """What `tp_rank` of `tp_size` holds. Raises: GeometryError when the stack does not divide."""
        stack, cols = sum(block.rows for block in self.blocks), self.blocks[0].cols
        if self.split == "none":
            rows, pieces = stack, _stack(self.blocks)
        elif self.split == "rows":
            rows = self._share(padded_vocab if self.is_vocab else stack, tp_size)
            pieces = _run(self.blocks, tp_rank * rows, rows)
        elif self.split == "rows_of_each":
            cut = tuple(self._row_cut(number, tp_rank, tp_size) for number in range(len(self.blocks)))
            rows, pieces = sum(block.rows for block in cut), _stack(cut)
        else:
            rows, cols = stack, self._share(cols, tp_size)
            pieces = _stack(tuple(Rect(b.hf, b.row, b.col + tp_rank * cols, b.rows, cols) for b in self.blocks))
        return Local(self.name, (rows, cols) if self.ndim == 2 else (rows,), self.dtype or dtype, pieces)

    def in_engine(self) -> tuple[Parameter, ...]:
        """SGLang's parameters in place of this one."""
        return (replace(self, name=self.blocks[0].hf),) if self.engine is None else self.engine

    @property
    def num_elements(self) -> int:
        """Elements when tp is 1, without padding."""
        return sum(block.area for block in self.blocks)

    def _row_cut(self, number: int, tp_rank: int, tp_size: int) -> Rect:
        block, parts = self.blocks[number], tp_size
        if self.heads and self.heads[number] < tp_size:
            parts = self.heads[number]
            self._share(tp_size, parts)
        rows = self._share(block.rows, parts)
        return Rect(block.hf, block.row + tp_rank * parts // tp_size * rows, block.col, rows, block.cols)

    def _share(self, size: int, parts: int) -> int:
        if size % parts:
            fix = "choose another tensor-parallel size"
            raise GeometryError(f"{size} rows or columns cannot be cut in {parts} equal parts", where=self.name, fix=fix)
        return size // parts


def _stack(blocks: tuple[Rect, ...]) -> tuple[Piece, ...]:
    pieces, row = [], 0
    for block in blocks:
        pieces.append(Piece(block, row))
        row += block.rows
    return tuple(pieces)


def _run(blocks: tuple[Rect, ...], start: int, rows: int) -> tuple[Piece, ...]:
    """Rows [start, start + rows) of the stack. A cut may fall inside a block: that is how Megatron shares one KV group
    between several tp ranks, and how the last vocabulary shard can be shorter than the others, or empty."""
    pieces = []
    for piece in _stack(blocks):
        block = piece.rect
        first, last = max(piece.row, start), min(piece.row + block.rows, start + rows)
        if first < last:
            pieces.append(Piece(Rect(block.hf, block.row + first - piece.row, block.col, last - first, block.cols), first - start))
    return tuple(pieces)


@dataclass(frozen=True)
class Model:
    """Every parameter of one model. Nothing here depends on a layout.

    head: output_layer.weight; of a tied model it is a second copy of the embedding, which Megatron keeps only where the
    first and last stage differ; None in a critic, which has an end of its own that no HF tensor fills. ignored: endings of HF
    names that checkpoints carry and nobody reads.
    has_attention_dp: SGLang's class of this model can cut attention into fewer parts than the rest. not_in_engine: why SGLang
    cannot run this model, where that is so.
    """

    dims: Dims
    embedding: Parameter
    layers: tuple[tuple[Parameter, ...], ...]
    final_norm: Parameter
    head: Parameter | None
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    has_attention_dp: bool = False
    not_in_engine: str | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: plans are cached by layout, and a mixture of experts has tens of thousands of parameters."""
        return hash((self.dims, self.layers, self.head))

    def parameters(self) -> tuple[Parameter, ...]:
        """All of them, in the order of the forward pass; a tied head comes last, as in a model of several stages."""
        head = () if self.head is None else (self.head,)
        return (self.embedding, *(p for layer in self.layers for p in layer), self.final_norm, *head)

    def without_head(self) -> Model:
        """The backbone alone: what a critic takes from a checkpoint."""
        return replace(self, head=None)

    def engine_parameters(self) -> Iterator[Parameter]:
        """SGLang's parameters of the same model; it keeps no head that is tied."""
        for parameter in self.parameters():
            if not (self.dims.is_tied and parameter is self.head):
                yield from parameter.in_engine()

    @cached_property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of every HF tensor, in the order of the forward pass."""
        shapes: dict[str, Shape] = {}
        for parameter in self.parameters():
            for block in parameter.blocks:
                rows, cols = block.row + block.rows, block.col + block.cols
                rows = max(rows, shapes.get(block.hf, (0,))[0])
                shapes[block.hf] = (rows, cols) if parameter.ndim == 2 else (rows,)
        return shapes

    @cached_property
    def hf_dtypes(self) -> dict[str, torch.dtype]:
        """The HF tensors that keep a dtype of their own, whatever the model is stored in."""
        return {block.hf: parameter.dtype for parameter in self.parameters() if parameter.dtype for block in parameter.blocks}

    @property
    def num_parameters(self) -> int:
        """Elements of all HF tensors: what model cards count."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())
