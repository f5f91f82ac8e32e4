"""Megatron's shards written down the slow way: whole tensors, reshapes and chunks, no rectangles.

From Megatron-Core 0.16.1 (attention.py: "q1 q2 k1 v1 | q3 q4 k2 v2 | ..."; mlp.py: gate and up of a rank side by side;
multi_latent_attention.py; moe/experts.py) and transformers' modelling files. Takes a plain HF config and the HF tensors, and
nothing from the code under test.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def megatron_ranks(
    config: dict[str, Any], hf: Tensors, stages: list[list[int]], *, tp: int, replicas: int, ep: int, etp: int
) -> list[Tensors]:
    """Global Megatron name -> tensor, for every rank of a world."""
    ranks = []
    for number, layers in enumerate(stages):
        first, last = number == 0, number == len(stages) - 1
        ends = "both" if first and last else "first" if first else "last" if last else "none"
        # The ranks of a stage in order, once as Megatron deals them to tensor parallelism, once to experts (etp fastest, then ep).
        dense = [tp_rank for _, tp_rank in itertools.product(range(replicas), range(tp))]
        routed = list(itertools.product(range(replicas * tp // (ep * etp)), range(ep), range(etp)))
        for tp_rank, (_, ep_rank, etp_rank) in zip(dense, routed, strict=True):
            shard = megatron_shard(config, hf, tp, tp_rank, layers, ends)
            for n in layers:
                shard |= _experts(hf, n, (ep, ep_rank), (etp, etp_rank))
            ranks.append(shard)
    return ranks


def megatron_shard(config: dict[str, Any], hf: Tensors, tp: int, tp_rank: int, layers: list[int], ends: str) -> Tensors:
    """One rank without its routed experts. ends: "first", "last", "both" or "none", the stage's place in the pipeline."""
    shard: Tensors = {}
    padded = -(-config["vocab_size"] // (128 * tp)) * 128 * tp
    if ends in ("first", "both"):
        shard["embedding.word_embeddings.weight"] = _vocab(hf["model.embed_tokens.weight"], padded, tp, tp_rank)
    for n in layers:
        te, name = f"decoder.layers.{n}.", f"model.layers.{n}."
        if f"{name}self_attn.kv_b_proj.weight" in hf:
            shard |= _latent_attention(hf, te, name, (tp, tp_rank))
        else:
            shard |= _attention(config, hf, n, (tp, tp_rank))
        if f"{name}mlp.gate_proj.weight" in hf:
            shard[f"{te}mlp.linear_fc1.layer_norm_weight"] = hf[f"{name}post_attention_layernorm.weight"]
            shard |= _mlp(hf, f"{te}mlp", f"{name}mlp", (tp, tp_rank))
        else:
            shard |= _beside_experts(hf, te, name, (tp, tp_rank))
    if ends in ("last", "both"):
        shard["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if ends == "last" or not config.get("tie_word_embeddings", False):
            shard["output_layer.weight"] = _vocab(hf.get("lm_head.weight", hf["model.embed_tokens.weight"]), padded, tp, tp_rank)
    return shard


def _attention(config: dict[str, Any], hf: Tensors, n: int, part: tuple[int, int]) -> Tensors:
    te, name, (tp, tp_rank), shard = f"decoder.layers.{n}.", f"model.layers.{n}.", part, {}
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    for kind in ("weight", "bias"):
        if f"{name}self_attn.q_proj.{kind}" in hf:
            q, k, v = (hf[f"{name}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            grouped = torch.cat([one.reshape(groups, one.shape[0] // groups, -1) for one in (q, k, v)], dim=1)
            shard[f"{te}self_attention.linear_qkv.{kind}"] = grouped.reshape(-1, *q.shape[1:]).chunk(tp)[tp_rank]
    shard[f"{te}self_attention.linear_qkv.layer_norm_weight"] = hf[f"{name}input_layernorm.weight"]
    shard[f"{te}self_attention.linear_proj.weight"] = hf[f"{name}self_attn.o_proj.weight"].chunk(tp, dim=1)[tp_rank]
    for letter in "qk":
        if f"{name}self_attn.{letter}_norm.weight" in hf:
            shard[f"{te}self_attention.{letter}_layernorm.weight"] = hf[f"{name}self_attn.{letter}_norm.weight"]
    return shard


def _latent_attention(hf: Tensors, te: str, name: str, part: tuple[int, int]) -> Tensors:
    """Heads are the outermost dimension of the wide matrices, so a chunk of rows is a run of heads."""
    (tp, tp_rank), te, own = part, f"{te}self_attention.", f"{name}self_attn."
    shard = {
        f"{te.removesuffix('self_attention.')}input_layernorm.weight": hf[f"{name}input_layernorm.weight"],
        f"{te}linear_kv_down_proj.weight": hf[f"{own}kv_a_proj_with_mqa.weight"],
        f"{te}linear_kv_up_proj.layer_norm_weight": hf[f"{own}kv_a_layernorm.weight"],
        f"{te}linear_kv_up_proj.weight": hf[f"{own}kv_b_proj.weight"].chunk(tp)[tp_rank],
        f"{te}linear_proj.weight": hf[f"{own}o_proj.weight"].chunk(tp, dim=1)[tp_rank],
    }
    if f"{own}q_proj.weight" in hf:
        shard[f"{te}linear_q_proj.weight"] = hf[f"{own}q_proj.weight"].chunk(tp)[tp_rank]
    else:
        shard[f"{te}linear_q_down_proj.weight"] = hf[f"{own}q_a_proj.weight"]
        shard[f"{te}linear_q_up_proj.layer_norm_weight"] = hf[f"{own}q_a_layernorm.weight"]
        shard[f"{te}linear_q_up_proj.weight"] = hf[f"{own}q_b_proj.weight"].chunk(tp)[tp_rank]
    return shard


def _mlp(hf: Tensors, te: str, name: str, part: tuple[int, int]) -> Tensors:
    tp, tp_rank = part
    halves = [hf[f"{name}.{which}_proj.weight"].chunk(tp)[tp_rank] for which in ("gate", "up")]
    return {
        f"{te}.linear_fc1.weight": torch.cat(halves),
        f"{te}.linear_fc2.weight": hf[f"{name}.down_proj.weight"].chunk(tp, dim=1)[tp_rank],
    }


def _beside_experts(hf: Tensors, te: str, name: str, part: tuple[int, int]) -> Tensors:
    """Norm, router and shared expert of a layer with experts."""
    block = f"{name}block_sparse_moe" if f"{name}block_sparse_moe.gate.weight" in hf else f"{name}mlp"
    shard = {
        f"{te}pre_mlp_layernorm.weight": hf[f"{name}post_attention_layernorm.weight"],
        f"{te}mlp.router.weight": hf[f"{block}.gate.weight"],
    }
    if f"{block}.gate.e_score_correction_bias" in hf:
        shard[f"{te}mlp.router.expert_bias"] = hf[f"{block}.gate.e_score_correction_bias"]
    for shared in ("shared_expert", "shared_experts"):
        if f"{block}.{shared}.gate_proj.weight" in hf:
            shard |= _mlp(hf, f"{te}mlp.shared_experts", f"{block}.{shared}", part)
    if f"{block}.shared_expert_gate.weight" in hf:
        shard[f"{te}mlp.shared_experts.gate_weight"] = hf[f"{block}.shared_expert_gate.weight"]
    return shard


def _experts(hf: Tensors, n: int, share: tuple[int, int], part: tuple[int, int]) -> Tensors:
    """The routed experts of layer n that one ep rank holds, each cut by etp."""
    (ep, ep_rank), (etp, etp_rank), shard = share, part, {}
    gate, up, down, found = "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj", 0
    if f"model.layers.{n}.block_sparse_moe.gate.weight" in hf:
        gate, up, down = (f"block_sparse_moe.experts.{{}}.{w}" for w in ("w1", "w3", "w2"))
    while f"model.layers.{n}.{gate.format(found)}.weight" in hf:
        found += 1
    for e in torch.arange(found).chunk(ep)[ep_rank].tolist() if found else []:
        first, second, last = (hf[f"model.layers.{n}.{which.format(e)}.weight"] for which in (gate, up, down))
        te = f"decoder.layers.{n}.mlp.experts"
        shard[f"{te}.linear_fc1.weight{e}"] = torch.cat([first.chunk(etp)[etp_rank], second.chunk(etp)[etp_rank]])
        shard[f"{te}.linear_fc2.weight{e}"] = last.chunk(etp, dim=1)[etp_rank]
    return shard


def _vocab(weight: Tensor, padded: int, tp: int, tp_rank: int) -> Tensor:
    filler = torch.full((padded - weight.shape[0], weight.shape[1]), float("nan"), dtype=weight.dtype)
    return torch.cat([weight, filler]).chunk(tp)[tp_rank]
