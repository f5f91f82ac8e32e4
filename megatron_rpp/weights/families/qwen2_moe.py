"""Qwen2-MoE and Qwen1.5-MoE (`model_type: qwen2_moe`): Qwen2's attention, experts, and one shared expert behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.hf.engine import engine_limit
from megatron_rpp.weights.families import llama, qwen2
from megatron_rpp.weights.families.blocks import gated_mlp, replicated
from megatron_rpp.weights.families.dims import Dims, size
from megatron_rpp.weights.families.parameter import Model, Parameter
from megatron_rpp.weights.families.qwen3_moe import dense_layers, moe


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for. Raises: what Dims.from_hf raises."""
    dims, shared = Dims.from_hf(config, experts="num_experts"), size(config, "shared_expert_intermediate_size")
    dense = dense_layers(config, dims.layers)

    def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
        sparse = () if n in dense else (*moe(dims, n), *shared_expert(dims, n, shared))
        return (*qwen2.attention(dims, n), *(sparse or llama.mlp(dims, n)))

    limit = engine_limit("qwen2_moe", is_tied=dims.is_tied, dense_layers=dense)
    return llama.decoder(dims, layer, has_attention_dp=True, not_in_engine=limit)


def shared_expert(dims: Dims, n: int, ffn: int) -> tuple[Parameter, ...]:
    """The expert that sees every token, and its gate."""
    te, hf = f"decoder.layers.{n}.mlp.shared_experts", f"model.layers.{n}.mlp.shared_expert"
    gate = replicated(f"{te}.gate_weight", f"{hf}_gate.weight", 1, dims.hidden)
    return (*gated_mlp(te, hf, ffn, dims.hidden), gate)
