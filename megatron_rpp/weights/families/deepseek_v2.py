"""DeepSeek-V2 and V2-Lite (`model_type: deepseek_v2`): latent attention, a few dense layers, then experts and shared ones.

The shared experts are one gated MLP, as wide as all of them. SGLang must run without fusing them into the routed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_rpp.weights.families import llama, qwen3_moe
from megatron_rpp.weights.families.blocks import gated_mlp, latent_attention, whole
from megatron_rpp.weights.families.dims import Dims, Latent, refuse
from megatron_rpp.weights.families.parameter import Model, Parameter


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: ConfigError for attention_bias, what Dims.from_hf and Latent.from_hf raise."""
    return decoder(config, has_bias=config.get("topk_method") == "noaux_tc")


def decoder(config: Mapping[str, Any], *, has_bias: bool, **more: Any) -> Model:
    """has_bias: the router adds a bias to the scores when it chooses experts. Raises: as describe."""
    refuse(config, "attention_bias")
    dims, latent = Dims.from_hf(config, experts="n_routed_experts"), Latent.from_hf(config)
    first, step, shared = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1, config.get("n_shared_experts") or 0

    def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
        te, hf = f"decoder.layers.{n}", f"model.layers.{n}"
        norm = whole(f"{te}.input_layernorm.weight", f"{hf}.input_layernorm.weight", dims.hidden)
        attention = (norm, *latent_attention(f"{te}.self_attention", f"{hf}.self_attn", dims, latent))
        if n < first or n % step:
            return (*attention, *llama.mlp(dims, n))
        return (*attention, *qwen3_moe.moe(dims, n), *_beside(dims, n, shared, has_bias))

    return llama.decoder(dims, layer, has_attention_dp=True, **more)


def _beside(dims: Dims, n: int, shared: int, has_bias: bool) -> tuple[Parameter, ...]:
    """What a layer has beside its routed experts. Megatron keeps the bias as a float32 buffer, HF and SGLang as a parameter."""
    te, hf, found = f"decoder.layers.{n}.mlp", f"model.layers.{n}.mlp", []
    if has_bias:
        found.append(whole(f"{te}.router.expert_bias", f"{hf}.gate.e_score_correction_bias", dims.experts, dtype=torch.float32))
    if shared:
        found += gated_mlp(f"{te}.shared_experts", f"{hf}.shared_experts", shared * dims.expert_ffn, dims.hidden)
    return tuple(found)
