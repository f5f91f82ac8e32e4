"""Mixtral (`model_type: mixtral`): Llama's attention, and experts in every layer under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.hf.engine import engine_limit
from megatron_rpp.weights.families import llama
from megatron_rpp.weights.families.blocks import experts, replicated, whole
from megatron_rpp.weights.families.dims import Dims
from megatron_rpp.weights.families.parameter import Model, Parameter


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: what Dims.from_hf raises."""
    dims = Dims.from_hf(config, experts="num_local_experts", expert_ffn="intermediate_size")
    return llama.decoder(dims, layer, not_in_engine=engine_limit("mixtral", is_tied=dims.is_tied, dense_layers=()))


def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
    """The parameters of layer n of the whole model. w1 is the gate, w3 is up, w2 is down."""
    te, hf = f"decoder.layers.{n}", f"model.layers.{n}"
    return (
        *llama.attention(dims, n),
        whole(f"{te}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", dims.hidden),
        replicated(f"{te}.mlp.router.weight", f"{hf}.block_sparse_moe.gate.weight", dims.experts, dims.hidden),
        *experts(f"{te}.mlp.experts", f"{hf}.block_sparse_moe.experts", dims, names=("w1", "w3", "w2")),
    )
