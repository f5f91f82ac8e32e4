"""The half dozen ways in which Megatron stores HF tensors; a family is a list of these."""

from __future__ import annotations

from megatron_rpp.weights.families.parameter import Dims, Parameter
from megatron_rpp.weights.rect import Rect


def whole(name: str, hf: str, size: int) -> Parameter:
    """A vector that every tp rank holds (norms)."""
    return Parameter(name, (Rect(hf, 0, 0, size, 1),), "none", ndim=1)


def columns(name: str, hf: str, rows: int, cols: int) -> Parameter:
    """A matrix whose input dimension is shared (attention output, down): strided in the HF tensor."""
    return Parameter(name, (Rect(hf, 0, 0, rows, cols),), "columns")


def gate_up(name: str, hf: str, dims: Dims) -> Parameter:
    """Gate above up on every rank, so the ranks' rows one after the other are not the HF order."""
    blocks = tuple(Rect(f"{hf}.{part}_proj.weight", 0, 0, dims.ffn, dims.hidden) for part in ("gate", "up"))
    return Parameter(name, blocks, "rows_of_each")


def grouped_qkv(name: str, hf: str, dims: Dims, kind: str = "weight") -> Parameter:
    """Query, key and value by KV group: for each group its query heads, then its key head, then its value head.

    No permutation for RoPE: Megatron's rotary_interleaved=False rotates halves, as HF does.
    """
    query, cols = dims.heads // dims.kv_heads * dims.head, dims.hidden if kind == "weight" else 1
    blocks = []
    for group in range(dims.kv_heads):
        for part, rows in (("q", query), ("k", dims.head), ("v", dims.head)):
            blocks.append(Rect(f"{hf}.{part}_proj.{kind}", group * rows, 0, rows, cols))
    return Parameter(name, tuple(blocks), "rows", ndim=2 if kind == "weight" else 1)


def vocab_rows(name: str, hf: str, dims: Dims) -> Parameter:
    """Embedding or head: rows of the vocabulary, padded by Megatron to a multiple that depends on tp."""
    return Parameter(name, (Rect(hf, 0, 0, dims.vocab, dims.hidden),), "rows", is_vocab=True)
