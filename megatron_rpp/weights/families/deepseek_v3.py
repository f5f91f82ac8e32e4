"""DeepSeek-V3 and R1 (`model_type: deepseek_v3`): DeepSeek-V2 whose router has a bias; checkpoints carry layers to predict further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_rpp.weights.families import deepseek_v2
from megatron_rpp.weights.families.dims import size
from megatron_rpp.weights.families.parameter import Model

_BESIDE = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")


def describe(config: Mapping[str, Any]) -> Model:
    """The model that config.json stands for, without its layers that predict further tokens. Raises: as deepseek_v2.describe."""
    layers, further = size(config, "num_hidden_layers"), config.get("num_nextn_predict_layers") or 0
    longer = deepseek_v2.decoder({**config, "num_hidden_layers": layers + further}, has_bias=True)
    extra = [block.hf for layer in longer.layers[layers:] for parameter in layer for block in parameter.blocks]
    extra += [f"model.layers.{layers + n}.{name}.weight" for n in range(further) for name in _BESIDE]
    dims = replace(longer.dims, layers=layers)
    return replace(longer, dims=dims, layers=longer.layers[:layers], ignored=(*longer.ignored, *dict.fromkeys(extra)))
