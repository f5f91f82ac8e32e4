"""Megatron's shards written down the slow way: whole tensors, reshapes and chunks, no rectangles.

From Megatron-Core 0.16.1 (attention.py: "q1 q2 k1 v1 | q3 q4 k2 v2 | ..."; mlp.py: gate and up of a rank side by side) and
transformers' modelling files. Takes a plain HF config and the HF tensors, and nothing from the code under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def megatron_shard(config: dict[str, Any], hf: dict[str, Tensor], tp: int, tp_rank: int, layers: list[int], ends: str) -> dict[str, Tensor]:
    """Global Megatron name -> tensor of one rank. ends: "first", "last", "both" or "none", the stage's place in the pipeline."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    shard: dict[str, Tensor] = {}
    padded = -(-config["vocab_size"] // (128 * tp)) * 128 * tp
    if ends in ("first", "both"):
        shard["embedding.word_embeddings.weight"] = _vocab(hf["model.embed_tokens.weight"], padded, tp, tp_rank)
    for n in layers:
        te, name = f"decoder.layers.{n}.", f"model.layers.{n}."
        for kind in ("weight", "bias"):
            if f"{name}self_attn.q_proj.{kind}" in hf:
                q, k, v = (hf[f"{name}self_attn.{part}_proj.{kind}"] for part in "qkv")
                grouped = torch.cat([part.reshape(groups, part.shape[0] // groups, -1) for part in (q, k, v)], dim=1)
                shard[f"{te}self_attention.linear_qkv.{kind}"] = grouped.reshape(-1, *q.shape[1:]).chunk(tp)[tp_rank]
        shard[f"{te}self_attention.linear_qkv.layer_norm_weight"] = hf[f"{name}input_layernorm.weight"]
        shard[f"{te}self_attention.linear_proj.weight"] = hf[f"{name}self_attn.o_proj.weight"].chunk(tp, dim=1)[tp_rank]
        for part in "qk":
            if f"{name}self_attn.{part}_norm.weight" in hf:
                shard[f"{te}self_attention.{part}_layernorm.weight"] = hf[f"{name}self_attn.{part}_norm.weight"]
        shard[f"{te}mlp.linear_fc1.layer_norm_weight"] = hf[f"{name}post_attention_layernorm.weight"]
        halves = [hf[f"{name}mlp.{part}_proj.weight"].chunk(tp)[tp_rank] for part in ("gate", "up")]
        shard[f"{te}mlp.linear_fc1.weight"] = torch.cat(halves)
        shard[f"{te}mlp.linear_fc2.weight"] = hf[f"{name}mlp.down_proj.weight"].chunk(tp, dim=1)[tp_rank]
    if ends in ("last", "both"):
        shard["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if ends == "last" or not config.get("tie_word_embeddings", False):
            shard["output_layer.weight"] = _vocab(hf.get("lm_head.weight", hf["model.embed_tokens.weight"]), padded, tp, tp_rank)
    return shard


def _vocab(weight: Tensor, padded: int, tp: int, tp_rank: int) -> Tensor:
    filler = torch.full((padded - weight.shape[0], weight.shape[1]), float("nan"), dtype=weight.dtype)
    return torch.cat([weight, filler]).chunk(tp)[tp_rank]
