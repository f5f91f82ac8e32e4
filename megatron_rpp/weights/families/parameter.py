"""What a family says about one Megatron parameter, and about the model as a whole.

A parameter is a column of HF rectangles (its `blocks`, in the order Megatron stores them on one rank) and a rule by which
tensor parallelism cuts it. Both are plain data, so two processes that read one config agree to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.weights.rect import Local, Piece, Rect, Shape

Split = Literal["none", "rows", "rows_of_each", "columns"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron parameter under its Transformer Engine name, layers counted over the whole model from 0.

    blocks: HF rectangles, stacked by rows when tp is 1. split: how tp ranks share the stack.
    none          every rank holds all of it
    rows          rank r holds the r-th run of rows of the whole stack (QKV by KV group, embeddings)
    rows_of_each  rank r holds the r-th run of every block (gate and up)
    columns       rank r holds the r-th run of columns (attention output, down)
    is_vocab: the stack is padded below to the layout's padded vocabulary.
    """

    name: str
    blocks: tuple[Rect, ...]
    split: Split
    ndim: int = 2
    is_vocab: bool = False

    def local(self, tp_rank: int, tp_size: int, *, dtype: torch.dtype, padded_vocab: int) -> Local:
        """What `tp_rank` of `tp_size` holds. Raises: GeometryError when the stack does not divide."""
        stack, cols = sum(block.rows for block in self.blocks), self.blocks[0].cols
        if self.split == "none":
            rows, pieces = stack, _stack(self.blocks)
        elif self.split == "rows":
            rows = _share(padded_vocab if self.is_vocab else stack, tp_size, self.name)
            pieces = _run(self.blocks, tp_rank * rows, rows)
        elif self.split == "rows_of_each":
            shares = [(block, _share(block.rows, tp_size, self.name)) for block in self.blocks]
            rows = sum(share for _, share in shares)
            pieces = _stack(tuple(Rect(b.hf, b.row + tp_rank * share, b.col, share, b.cols) for b, share in shares))
        else:
            rows, cols = stack, _share(cols, tp_size, self.name)
            pieces = _stack(tuple(Rect(b.hf, b.row, b.col + tp_rank * cols, b.rows, cols) for b in self.blocks))
        return Local(self.name, (rows, cols) if self.ndim == 2 else (rows,), dtype, pieces)


def _share(size: int, tp_size: int, name: str) -> int:
    if size % tp_size:
        raise GeometryError(f"{size} rows or columns cannot be cut in {tp_size} equal parts", where=name, fix="choose another parallel.tp")
    return size // tp_size


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


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of a dense decoder, from its HF config."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    is_tied: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Dims:
        """Raises: ConfigError naming a key that is missing or is no positive whole number; GeometryError for head counts."""
        heads = _size(config, "num_attention_heads")
        dims = cls(
            layers=_size(config, "num_hidden_layers"),
            hidden=_size(config, "hidden_size"),
            ffn=_size(config, "intermediate_size"),
            heads=heads,
            # Llama 1 and 2 configs leave out what later ones spell: as many KV heads as heads, hidden = heads x head.
            kv_heads=_size(config, "num_key_value_heads", default=heads),
            head=_size(config, "head_dim", default=int(config.get("hidden_size") or 0) // heads),
            vocab=_size(config, "vocab_size"),
            is_tied=bool(config.get("tie_word_embeddings", False)),
        )
        if dims.heads % dims.kv_heads:
            raise GeometryError(f"{dims.heads} heads cannot share {dims.kv_heads} KV heads", where="config.json")
        return dims


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError("not a size", where=f"config.json: {key}", expected="a positive whole number", got=value)
    return value


def refuse(config: Mapping[str, Any], *keys: str) -> None:
    """Raises ConfigError for an HF switch whose tensors this family does not describe."""
    for key in keys:
        if config.get(key):
            raise ConfigError("not supported by this family", where=f"config.json: {key}", expected="false or absent", got=config[key])


@dataclass(frozen=True)
class Model:
    """Every parameter of one model. Nothing here depends on a layout.

    head: output_layer.weight; of a tied model it is a second copy of the embedding, which Megatron keeps only where the
    first and last stage differ. ignored: endings of HF names that old checkpoints carry and nobody reads.
    """

    dims: Dims
    embedding: Parameter
    layers: tuple[tuple[Parameter, ...], ...]
    final_norm: Parameter
    head: Parameter
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def parameters(self) -> tuple[Parameter, ...]:
        """All of them, in the order of the forward pass; a tied head comes last, as in a model of several stages."""
        return (self.embedding, *(p for layer in self.layers for p in layer), self.final_norm, self.head)

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of every HF tensor, in the order of the forward pass."""
        shapes: dict[str, Shape] = {}
        for parameter in self.parameters():
            for block in parameter.blocks:
                rows, cols = block.row + block.rows, block.col + block.cols
                rows = max(rows, shapes.get(block.hf, (0,))[0])
                shapes[block.hf] = (rows, cols) if parameter.ndim == 2 else (rows,)
        return shapes
