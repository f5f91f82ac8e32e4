"""Llama 1, 2 and 3 (`model_type: llama`): grouped-query attention, gated MLP, RMSNorm, no biases.

Source: names and shapes of transformers' LlamaForCausalLM; Megatron names of the Transformer Engine layer spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_rpp.weights.families.blocks import columns, gated_mlp, grouped_qkv, vocab_rows, whole
from megatron_rpp.weights.families.dims import Dims, refuse
from megatron_rpp.weights.families.parameter import Model, Parameter

Layer = Callable[[Dims, int], tuple[Parameter, ...]]


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: ConfigError for attention_bias or mlp_bias, and what Dims.from_hf raises."""
    refuse(config, "attention_bias", "mlp_bias")  # Megatron has one switch for both; HF files come with neither
    return decoder(Dims.from_hf(config), layer)


def decoder(dims: Dims, layer: Layer, **more: Any) -> Model:
    """The frame that all families share; they differ in the layer. more: fields of Model."""
    embedding = "model.embed_tokens.weight"
    return Model(
        dims=dims,
        embedding=vocab_rows("embedding.word_embeddings.weight", embedding, dims, over="attention"),
        layers=tuple(layer(dims, n) for n in range(dims.layers)),
        final_norm=whole("decoder.final_layernorm.weight", "model.norm.weight", dims.hidden),
        head=vocab_rows("output_layer.weight", embedding if dims.is_tied else "lm_head.weight", dims),
        **more,
    )


def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The parameters of layer n of the whole model."""
    return (*attention(dims, n), *mlp(dims, n))


def attention(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The norm before attention, and attention."""
    te, hf = f"decoder.layers.{n}.self_attention", f"model.layers.{n}"
    return (
        whole(f"{te}.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight", dims.hidden),
        grouped_qkv(f"{te}.linear_qkv.weight", f"{hf}.self_attn", dims),
        columns(f"{te}.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", dims.hidden, dims.heads * dims.head, over="attention"),
    )


def mlp(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The norm before a dense MLP, and the MLP."""
    te, hf = f"decoder.layers.{n}.mlp", f"model.layers.{n}"
    norm = whole(f"{te}.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight", dims.hidden)
    return (norm, *gated_mlp(te, f"{hf}.mlp", dims.ffn, dims.hidden))
