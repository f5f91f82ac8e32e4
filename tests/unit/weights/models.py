"""Small models for the weights tests: configs, random HF tensors, and tensors of every rank of a layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import Layout
from megatron_rpp.weights.planner import Plan
from megatron_rpp.weights.rect import Local, view

SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 301,  # no tp divides it, and with tp 4 a shard is all padding
}

# One config for each thing that changes the mapping.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama2, one KV head a head": {"model_type": "llama", **SIZES, "num_key_value_heads": None},
    "llama, tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "qwen2, biases": {"model_type": "qwen2", **SIZES},
    "qwen2.5, biases and tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3, norms and a wide head": {"model_type": "qwen3", **SIZES, "head_dim": 6},
    "qwen3, tied, 2 KV heads": {"model_type": "qwen3", **SIZES, "head_dim": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
}

MOE_SIZES = {**SIZES, "num_hidden_layers": 4, "moe_intermediate_size": 16}
QWEN_MOE = {**MOE_SIZES, "num_experts": 8}
DEEPSEEK = {
    **MOE_SIZES,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}

# The same with experts. "some layers dense" is no model for SGLang.
MOE_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", **QWEN_MOE, "head_dim": 6},
    "qwen3_moe, some layers dense": {"model_type": "qwen3_moe", **QWEN_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen2_moe, shared expert": {"model_type": "qwen2_moe", **QWEN_MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": []},
    "mixtral": {"model_type": "mixtral", **MOE_SIZES, "num_local_experts": 8},
    "deepseek_v2-lite, whole query": {"model_type": "deepseek_v2", **DEEPSEEK, "q_lora_rank": None},
    "deepseek_v2": {"model_type": "deepseek_v2", **DEEPSEEK},
    "deepseek_v3, router bias": {"model_type": "deepseek_v3", **DEEPSEEK, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
}
ALL_CONFIGS = CONFIGS | MOE_CONFIGS


def model_of(name: str) -> Model:
    return describe(ALL_CONFIGS[name])


def random_hf(model: Model, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Every element of the model is different, so that a misplaced one cannot go unseen (up to bfloat16's rounding)."""
    generator = torch.Generator().manual_seed(seed)
    own = model.hf_dtypes
    return {name: torch.randn(shape, generator=generator).to(own.get(name, dtype)) for name, shape in model.hf_shapes.items()}


def blank(locals_: tuple[Local, ...]) -> dict[str, Tensor]:
    """Not-a-numbers where values must come: what was not written shows."""
    return {local.name: torch.full(local.shape, float("nan"), dtype=local.dtype) for local in locals_}


def filled(layout: Layout, hf: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of every rank, cut from HF tensors by the layout's own rectangles."""
    ranks = []
    for rank in range(layout.ranks):
        tensors = blank(layout.locals(rank))
        for local in layout.locals(rank):
            for piece in local.pieces:
                rect = piece.rect
                matrix = hf[rect.hf] if hf[rect.hf].dim() == 2 else hf[rect.hf][:, None]
                part = matrix[rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols]
                view(tensors[local.name], piece, rect).copy_(part)
        ranks.append(tensors)
    return ranks


def carry_out(plan: Plan, sources: list[dict[str, Tensor]], dst: Layout) -> list[dict[str, Tensor]]:
    """The plan in one process, copy by copy, into blank tensors."""
    targets = [blank(dst.locals(rank)) for rank in range(dst.ranks)]
    for transfer in plan.transfers:
        source = view(sources[transfer.src][transfer.src_local], transfer.src_piece, transfer.rect)
        view(targets[transfer.dst][transfer.dst_local], transfer.dst_piece, transfer.rect).copy_(source)
    return targets


def same(left: Tensor, right: Tensor) -> bool:
    """Bitwise, so that not-a-numbers in padding compare equal."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def write_source(folder: Path, config: dict[str, Any]) -> Path:
    """An HF directory without weights: what an export carries over."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
