"""Llama 2 and 3 (`model_type: llama`): grouped-query attention, gated MLP, RMSNorm, no biases.

Source: names and shapes of transformers' LlamaForCausalLM; Megatron names of the Transformer Engine layer spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_rpp.weights.families.blocks import columns, gate_up, grouped_qkv, vocab_rows, whole
from megatron_rpp.weights.families.parameter import Dims, Model, Parameter, refuse

Layer = Callable[[Dims, int], tuple[Parameter, ...]]


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: ConfigError for attention_bias or mlp_bias, and what Dims.from_hf raises."""
    refuse(config, "attention_bias", "mlp_bias")  # Megatron has one switch for both; HF files come with neither
    return decoder(Dims.from_hf(config), layer)


def decoder(dims: Dims, layer: Layer) -> Model:
    """The frame that Llama, Qwen2 and Qwen3 share; they differ in the layer."""
    embedding = "model.embed_tokens.weight"
    return Model(
        dims=dims,
        embedding=vocab_rows("embedding.word_embeddings.weight", embedding, dims),
        layers=tuple(layer(dims, n) for n in range(dims.layers)),
        final_norm=whole("decoder.final_layernorm.weight", "model.norm.weight", dims.hidden),
        head=vocab_rows("output_layer.weight", embedding if dims.is_tied else "lm_head.weight", dims),
    )


def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The parameters of layer n of the whole model, on Megatron's side and on HF's."""
    te, hf = f"decoder.layers.{n}", f"model.layers.{n}"
    return (
        whole(f"{te}.self_attention.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight", dims.hidden),
        grouped_qkv(f"{te}.self_attention.linear_qkv.weight", f"{hf}.self_attn", dims),
        columns(f"{te}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", dims.hidden, dims.heads * dims.head),
        whole(f"{te}.mlp.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight", dims.hidden),
        gate_up(f"{te}.mlp.linear_fc1.weight", f"{hf}.mlp", dims),
        columns(f"{te}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight", dims.hidden, dims.ffn),
    )
