"""Tiny models with experts or latent attention, and what transformers holds of them under the names of their files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.mcore import tiny
from tests.mcore.hf import transformers as import_transformers

YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
    original_max_position_embeddings=16,
)  # fmt: skip
_SIZES = dict(
    vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
_EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
_LATENT = dict(
    **{**_SIZES, "num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=32, first_k_dense_replace=1,
    kv_lora_rank=32, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=16, n_shared_experts=2,
)  # fmt: skip
# Each with what its family has and others have not: layers without experts, weights that do not sum to 1, groups of experts.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", dict(**_SIZES, **_EXPERTS, head_dim=24, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen3_moe, plain weights": ("Qwen3Moe", dict(**_SIZES, **_EXPERTS, head_dim=24, norm_topk_prob=False)),
    "qwen2_moe": ("Qwen2Moe", dict(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=48, decoder_sparse_step=2)),
    "mixtral": ("Mixtral", dict(**_SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": ("DeepseekV3", dict(**_LATENT, q_lora_rank=24, n_group=4, topk_group=2, rope_parameters=YARN)),
    "deepseek_v2 lite": ("DeepseekV2", dict(**_LATENT, q_lora_rank=None, n_group=1, topk_group=1, rope_parameters=YARN)),
    "deepseek_v2": (
        "DeepseekV2",
        dict(**_LATENT, q_lora_rank=24, n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=4.0),
    ),
}
_PACKED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)$")


def make_hf(folder: Path, kind: str) -> Path:
    """Save a random float32 model of a kind in MODELS, with the config.json that the Hub has."""
    transformers = import_transformers()
    family, sizes = MODELS[kind]
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.3)  # enough to change which experts are chosen
            else:
                wide = "norm" in name or "bias" in name or name.endswith("mlp.gate.weight")
                tensor.add_(torch.randn_like(tensor) * (0.3 if wide else 0.06))
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "qwen3_moe":  # transformers 5 alone has another name for it
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    return folder


def correct(model: torch.nn.Module) -> torch.nn.Module:
    """Undo two faults of transformers' DeepseekV2: the softmax has lost yarn's scale, which DeepSeek's own code and SGLang have,
    and choosing by groups reads an attribute that nobody sets."""
    if model.config.model_type == "deepseek_v2":
        rope = model.config.rope_parameters
        for layer in model.model.layers:
            if rope["rope_type"] == "yarn":
                m = 0.1 * rope["mscale_all_dim"] * torch.tensor(rope["factor"]).log().item() + 1.0
                layer.self_attn.scaling *= m * m
            if hasattr(layer.mlp, "experts"):
                layer.mlp.num_experts = layer.mlp.experts.num_experts
    return model


def as_in_files(tensors: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """transformers packs the experts of a layer into one tensor; files have three for each."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed = _PACKED.match(name)
        if packed is None:
            found[_file_name(name, model_type)] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down_proj": expert}
            if packed["part"] == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for part, value in parts.items():
                found[_file_name(f"{packed['experts']}.{number}.{part}.weight", model_type)] = value
    return found


def _file_name(name: str, model_type: str) -> str:
    if model_type != "mixtral":
        return name
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for mine, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(f"{mine}.weight", f"{theirs}.weight")
    return name
