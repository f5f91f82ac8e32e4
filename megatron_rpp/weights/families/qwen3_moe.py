"""Qwen3-MoE (`model_type: qwen3_moe`): Qwen3's attention, and experts in some or all layers, none of them shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.hf.engine import engine_limit
from megatron_rpp.weights.families import llama, qwen3
from megatron_rpp.weights.families.blocks import experts, replicated, whole
from megatron_rpp.weights.families.dims import Dims, refuse
from megatron_rpp.weights.families.parameter import Model, Parameter


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: ConfigError for attention_bias, and what Dims.from_hf raises."""
    refuse(config, "attention_bias")
    # transformers 5 writes the second name, published checkpoints have the first
    dims = Dims.from_hf(config, experts="num_experts" if "num_experts" in config else "num_local_experts")
    dense = dense_layers(config, dims.layers)

    def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
        return (*qwen3.attention(dims, n), *(llama.mlp(dims, n) if n in dense else moe(dims, n)))

    limit = engine_limit("qwen3_moe", is_tied=dims.is_tied, dense_layers=dense)
    return llama.decoder(dims, layer, has_attention_dp=True, not_in_engine=limit)


def dense_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Layers without experts: those listed, and those that the step leaves out."""
    listed, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    return frozenset(n for n in range(layers) if n in listed or (n + 1) % step)


def moe(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The norm before the experts, the router and the experts."""
    te, hf = f"decoder.layers.{n}", f"model.layers.{n}"
    return (
        whole(f"{te}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", dims.hidden),
        replicated(f"{te}.mlp.router.weight", f"{hf}.mlp.gate.weight", dims.experts, dims.hidden),
        *experts(f"{te}.mlp.experts", f"{hf}.mlp.experts", dims),
    )
