"""Qwen2 and Qwen2.5, dense (`model_type: qwen2`): Llama with biases on query, key and value, often tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.weights.families import llama
from megatron_rpp.weights.families.blocks import grouped_qkv
from megatron_rpp.weights.families.dims import Dims
from megatron_rpp.weights.families.parameter import Model, Parameter


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: what Dims.from_hf raises."""
    return llama.decoder(Dims.from_hf(config), layer)


def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The parameters of layer n of the whole model."""
    return (*attention(dims, n), *llama.mlp(dims, n))


def attention(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """Llama's attention and one fused bias."""
    bias = grouped_qkv(f"decoder.layers.{n}.self_attention.linear_qkv.bias", f"model.layers.{n}.self_attn", dims, kind="bias")
    return (*llama.attention(dims, n), bias)
