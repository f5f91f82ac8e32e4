"""From `model_type` in an HF config to the family that describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_rpp.errors import ConfigError
from megatron_rpp.weights.families import deepseek_v2, deepseek_v3, llama, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from megatron_rpp.weights.families.parameter import Model

Describe = Callable[[Mapping[str, Any]], Model]

FAMILIES: dict[str, Describe] = {
    "llama": llama.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
    "qwen2_moe": qwen2_moe.describe,
    "qwen3_moe": qwen3_moe.describe,
    "mixtral": mixtral.describe,
    "deepseek_v2": deepseek_v2.describe,
    "deepseek_v3": deepseek_v3.describe,
}


def describe(config: Mapping[str, Any]) -> Model:
    """The model that an HF config dict stands for.

    Raises: ConfigError for a model_type no family knows, and for weights stored quantised (they are no plain rectangles).
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        fix = "a new family needs an entry in hf/model.py, and a module and an entry in weights/families"
        raise ConfigError("unknown model_type", where="config.json", expected=sorted(FAMILIES), got=model_type, fix=fix)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        raise ConfigError("quantised weights", where="config.json", expected="a float32, float16 or bfloat16 model", got=method)
    return FAMILIES[model_type](config)


def register(model_type: str, family: Describe) -> None:
    """Add a family from outside the package. Raises: ConfigError when the name is taken by another one."""
    if FAMILIES.setdefault(model_type, family) is not family:
        raise ConfigError("model_type already has a family", where=model_type, got=FAMILIES[model_type])
