"""The ways in which Megatron and SGLang store HF tensors; a family is a list of these."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_rpp.weights.families.dims import Dims, Latent
from megatron_rpp.weights.families.parameter import Axis, Parameter
from megatron_rpp.weights.rect import Rect


def whole(name: str, hf: str, size: int, dtype: torch.dtype | None = None) -> Parameter:
    """A vector that every tp rank holds (norms)."""
    return Parameter(name, (Rect(hf, 0, 0, size, 1),), "none", ndim=1, dtype=dtype)


def replicated(name: str, hf: str, rows: int, cols: int) -> Parameter:
    """A matrix that every tp rank holds (routers, the narrow side of latent attention)."""
    return Parameter(name, (Rect(hf, 0, 0, rows, cols),), "none")


def rows(name: str, hf: str, rows: int, cols: int) -> Parameter:
    """A matrix of attention whose output dimension is shared, head by head."""
    return Parameter(name, (Rect(hf, 0, 0, rows, cols),), "rows", over="attention")


def columns(name: str, hf: str, rows: int, cols: int, *, over: Axis = "dense") -> Parameter:
    """A matrix whose input dimension is shared (attention output, down): strided in the HF tensor."""
    return Parameter(name, (Rect(hf, 0, 0, rows, cols),), "columns", over=over)


def vocab_rows(name: str, hf: str, dims: Dims, *, over: Axis = "dense") -> Parameter:
    """Embedding or head: rows of the vocabulary, padded to a multiple that depends on tp, another one on each side."""
    return Parameter(name, (Rect(hf, 0, 0, dims.vocab, dims.hidden),), "rows", is_vocab=True, over=over)


def grouped_qkv(name: str, hf: str, dims: Dims, kind: str = "weight") -> Parameter:
    """Query, key and value by KV group: for each group its query heads, then its key head, then its value head.

    No permutation for RoPE: Megatron's rotary_interleaved=False rotates halves, as HF does. SGLang: all of Q, all of K, all of
    V, and a KV head on several ranks where there are fewer of them than ranks.
    """
    query, cols = dims.heads // dims.kv_heads * dims.head, dims.hidden if kind == "weight" else 1
    parts, blocks = (("q", query), ("k", dims.head), ("v", dims.head)), []
    for group in range(dims.kv_heads):
        blocks += [Rect(f"{hf}.{part}_proj.{kind}", group * rows, 0, rows, cols) for part, rows in parts]
    ndim = 2 if kind == "weight" else 1
    fused = tuple(Rect(f"{hf}.{part}_proj.{kind}", 0, 0, rows * dims.kv_heads, cols) for part, rows in parts)
    heads = (dims.heads, dims.kv_heads, dims.kv_heads)
    engine = Parameter(f"{hf}.qkv_proj.{kind}", fused, "rows_of_each", ndim=ndim, heads=heads, over="attention")
    return Parameter(name, tuple(blocks), "rows", ndim=ndim, engine=(engine,))


def gated_mlp(te: str, hf: str, ffn: int, hidden: int) -> tuple[Parameter, ...]:
    """Gate and up fused, and down. Gate above up on every rank, so the ranks' rows one after the other are not the HF order."""
    gate_up = tuple(Rect(f"{hf}.{part}_proj.weight", 0, 0, ffn, hidden) for part in ("gate", "up"))
    engine = Parameter(f"{hf}.gate_up_proj.weight", gate_up, "rows_of_each")
    return (
        Parameter(f"{te}.linear_fc1.weight", gate_up, "rows_of_each", engine=(engine,)),
        columns(f"{te}.linear_fc2.weight", f"{hf}.down_proj.weight", hidden, ffn),
    )


def experts(te: str, hf: str, dims: Dims, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> tuple[Parameter, ...]:
    """The routed experts of a layer. Megatron keeps a tensor for each, SGLang stacks a rank's experts in two tensors."""
    found = []
    for n in range(dims.experts):
        gate, up, down = (f"{hf}.{n}.{name}.weight" for name in names)
        gate_up = tuple(Rect(part, 0, 0, dims.expert_ffn, dims.hidden) for part in (gate, up))
        fc1 = Parameter(f"{te}.linear_fc1.weight{n}", gate_up, "rows_of_each", expert=n)
        fc2 = Parameter(f"{te}.linear_fc2.weight{n}", (Rect(down, 0, 0, dims.hidden, dims.expert_ffn),), "columns", expert=n)
        found.append(replace(fc1, engine=(replace(fc1, name=f"{hf}.w13_weight"),)))
        found.append(replace(fc2, engine=(replace(fc2, name=f"{hf}.w2_weight"),)))
    return tuple(found)


def latent_attention(te: str, hf: str, dims: Dims, latent: Latent) -> tuple[Parameter, ...]:
    """Multi-head latent attention: narrow projections on every rank, wide ones shared by heads, a norm between them.

    SGLang fuses the two narrow projections where the query has one.
    """
    hidden, narrow = dims.hidden, latent.key_value + latent.rope
    query, wide = dims.heads * (latent.nope + latent.rope), dims.heads * (latent.nope + latent.value)
    kv_down = replicated(f"{te}.linear_kv_down_proj.weight", f"{hf}.kv_a_proj_with_mqa.weight", narrow, hidden)
    if latent.query is None:
        found = [rows(f"{te}.linear_q_proj.weight", f"{hf}.q_proj.weight", query, hidden), kv_down]
    else:
        q_down = replicated(f"{te}.linear_q_down_proj.weight", f"{hf}.q_a_proj.weight", latent.query, hidden)
        fused = Parameter(f"{hf}.fused_qkv_a_proj_with_mqa.weight", q_down.blocks + kv_down.blocks, "none")
        found = [
            replace(q_down, engine=(fused,)),
            whole(f"{te}.linear_q_up_proj.layer_norm_weight", f"{hf}.q_a_layernorm.weight", latent.query),
            rows(f"{te}.linear_q_up_proj.weight", f"{hf}.q_b_proj.weight", query, latent.query),
            replace(kv_down, engine=()),
        ]
    found += [
        whole(f"{te}.linear_kv_up_proj.layer_norm_weight", f"{hf}.kv_a_layernorm.weight", latent.key_value),
        rows(f"{te}.linear_kv_up_proj.weight", f"{hf}.kv_b_proj.weight", wide, latent.key_value),
        columns(f"{te}.linear_proj.weight", f"{hf}.o_proj.weight", hidden, dims.heads * latent.value, over="attention"),
    ]
    return tuple(found)
