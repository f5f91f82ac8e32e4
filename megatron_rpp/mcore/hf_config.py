"""What a Hugging Face config.json says about a dense decoder: shape, rotary frequencies, and which variant it is.

Pure: reads one JSON file, imports neither megatron nor transformers. Llama (2 and 3), Qwen2 / Qwen2.5 and Qwen3 are known;
anything in the file that would change the mathematics and is not understood here is refused, never ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.errors import ConfigError

Json = Mapping[str, Any]

_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type means beyond sizes: which projections have biases, and whether queries and keys are normalised."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {family.model_type: family for family in (Family("llama"), Family("qwen2", qkv_bias=True), Family("qwen3", qk_norm=True))}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings of a config, in the form both transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) mean."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class HfModel:
    """The shape of a model as its directory tells it."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    is_tied: bool
    max_positions: int
    rope: Rope


def read_hf_config(hf_dir: Path) -> HfModel:
    """Read and check `hf_dir`/config.json.

    Raises: ConfigError naming the file and the entry, for a missing file, an unknown model_type, or a setting that this
    implementation would otherwise silently ignore (sliding windows, other activations, other rotary scalings, biases).
    """
    path = Path(hf_dir) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the model's configuration", where=str(path), got=error, fix="point model.hf at a Hugging Face model directory"
        ) from error
    return parse_hf_config(raw, where=str(path))


def parse_hf_config(raw: Json, *, where: str) -> HfModel:
    """The checks and the meaning of `read_hf_config`, on the parsed file."""
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise ConfigError("this model family is not supported", where=where, expected=" | ".join(FAMILIES), got=raw.get("model_type"))
    _refuse_unknown_mathematics(raw, family, where)
    try:
        heads = int(raw["num_attention_heads"])
        return HfModel(
            family=family,
            num_layers=int(raw["num_hidden_layers"]),
            hidden_size=int(raw["hidden_size"]),
            ffn_hidden_size=int(raw["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            vocab_size=int(raw["vocab_size"]),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            is_tied=bool(raw.get("tie_word_embeddings", False)),
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            rope=_parse_rope(raw, where),
        )
    except KeyError as error:
        raise ConfigError(f"the entry {error} is missing", where=where) from error


def inv_freq(model: HfModel) -> Tensor:
    """Rotary frequencies, exactly as transformers computes them (float32, same order of operations).

    default: theta^(-2i/d);  linear: that / factor;  llama3: / factor for long waves, unchanged for short ones, and a blend in between
    Shapes: -> [head_dim / 2] float32
    Source: transformers modeling_rope_utils; Megatron's own llama3 scaling fixes three of the four constants.
    """
    rope = model.rope
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.int64).to(torch.float32) / model.head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.type == "linear":
        return frequency / rope.factor
    if rope.type == "default":
        return frequency
    wavelength = 2 * math.pi / frequency
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_scaled = rope.original_max_positions / rope.low_freq_factor
    scaled = torch.where(wavelength > shortest_scaled, frequency / rope.factor, frequency)
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    is_between = (wavelength >= longest_kept) & (wavelength <= shortest_scaled)
    return torch.where(is_between, blended, scaled)


def _parse_rope(raw: Json, where: str) -> Rope:
    settings = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = settings.get("rope_type", settings.get("type", "default")) or "default"
    if kind not in _ROPE_TYPES:
        raise ConfigError(
            "this rotary scaling is not supported", where=f"{where}: rope_scaling", expected=" | ".join(_ROPE_TYPES), got=kind
        )
    if float(settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ConfigError("partial rotary embeddings are not supported", where=where, expected="partial_rotary_factor 1.0")
    return Rope(
        theta=float(settings.get("rope_theta", raw.get("rope_theta", 10000.0))),
        type=kind,
        factor=float(settings.get("factor", 1.0)),
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_max_positions=int(settings.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))),
    )


def _refuse_unknown_mathematics(raw: Json, family: Family, where: str) -> None:
    """Entries whose other values would need code that is not here. An absent entry means the supported value."""
    supported = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1, "quantization_config": None}
    if not family.qkv_bias:
        # Llama's flag also puts a bias on the output projection; Qwen2 has its three biases whatever the file says
        supported["attention_bias"] = False
    for name, wanted in supported.items():
        value = raw.get(name, wanted)
        if value is not None and value != wanted:
            raise ConfigError("this setting is not supported", where=f"{where}: {name}", expected=wanted, got=value)
    other_layers = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise ConfigError(
            "these layers are not supported", where=f"{where}: layer_types", expected="full_attention", got=", ".join(other_layers)
        )
