"""Qwen3, dense (`model_type: qwen3`): Llama with a norm on every query and key head; head_dim need not be hidden / heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.weights.families import llama
from megatron_rpp.weights.families.blocks import whole
from megatron_rpp.weights.families.dims import Dims, refuse
from megatron_rpp.weights.families.parameter import Model, Parameter


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: ConfigError for attention_bias, and what Dims.from_hf raises."""
    refuse(config, "attention_bias")
    return llama.decoder(Dims.from_hf(config), layer, has_attention_dp=True)


def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The parameters of layer n of the whole model."""
    return (*attention(dims, n), *llama.mlp(dims, n))


def attention(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """Llama's attention and two norms, the same for every head."""
    te, hf = f"decoder.layers.{n}.self_attention", f"model.layers.{n}.self_attn"
    norms = tuple(whole(f"{te}.{part}_layernorm.weight", f"{hf}.{part}_norm.weight", dims.head) for part in ("q", "k"))
    return (*llama.attention(dims, n), *norms)
