"""Rotary position embedding as a Hugging Face config.json asks for it. Pure: imports neither megatron nor transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.errors import ConfigError

Json = Mapping[str, Any]

_TYPES = ("default", "linear", "llama3")
_LATENT_TYPES = ("default", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings of a config, in the form both transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) mean.

    mscale, mscale_all_dim, of yarn: m(a) = 0.1 * a * ln(factor) + 1; cosine and sine are multiplied by m(mscale) /
    m(mscale_all_dim), the scale of the softmax by m(mscale_all_dim)^2.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


def parse_rope(raw: Json, *, where: str, is_latent: bool, default_theta: float) -> Rope:
    """The rotary settings of a parsed config.json.

    is_latent: for latent attention, where Megatron computes the frequencies itself; else they are those of `inv_freq`.
    Raises: ConfigError naming the entry that is not understood.
    """
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if old and new and _kind(old) != _kind(new):  # readers differ in which of the two they take
        raise ConfigError(
            "config.json says twice how positions are rotated, and not the same",
            where=where,
            expected="rope_scaling or rope_parameters, or both of one type",
            got=f"rope_scaling {_kind(old)}, rope_parameters {_kind(new)}",
            fix="remove the one that the model was not trained with",
        )
    settings = {**old, **new}
    kind = _kind(settings)
    known = _LATENT_TYPES if is_latent else _TYPES
    if kind not in known:
        raise ConfigError("this rotary scaling is not supported", where=f"{where}: rope_scaling", expected=" | ".join(known), got=kind)
    if float(settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ConfigError("partial rotary embeddings are not supported", where=where, expected="partial_rotary_factor 1.0")
    rope = Rope(
        theta=float(settings.get("rope_theta", raw.get("rope_theta")) or default_theta),
        type=kind,
        factor=float(settings.get("factor", 1.0)),
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_max_positions=int(settings.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))),
    )
    return _with_yarn(rope, settings, f"{where}: rope_scaling") if kind == "yarn" else rope


def _kind(settings: Json) -> str:
    return settings.get("rope_type", settings.get("type", "default")) or "default"


def _with_yarn(rope: Rope, settings: Json, where: str) -> Rope:
    """The entries of yarn, as transformers reads them: mscale counts only together with mscale_all_dim."""
    for name, wanted in (("attention_factor", None), ("truncate", True)):
        if settings.get(name, wanted) != wanted:
            raise ConfigError("this setting is not supported", where=f"{where}.{name}", expected=wanted, got=settings[name])
    for name in ("factor", "original_max_position_embeddings"):
        if settings.get(name) is None:
            raise ConfigError(f"the entry {name!r} is missing", where=where)
    mscale, all_dim = settings.get("mscale") or 0.0, settings.get("mscale_all_dim") or 0.0
    if all_dim and not mscale:
        raise ConfigError("mscale_all_dim without mscale is not supported", where=where, got=all_dim)
    return Rope(
        theta=rope.theta,
        type=rope.type,
        factor=rope.factor,
        original_max_positions=rope.original_max_positions,
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        mscale=float(mscale) if all_dim else 1.0,
        mscale_all_dim=float(all_dim),
    )


def inv_freq(rope: Rope, head_dim: int) -> Tensor:
    """Rotary frequencies, exactly as transformers computes them (float32, same order of operations).

    default: theta^(-2i/d);  linear: that / factor;  llama3: / factor for long waves, unchanged for short ones, and a blend in between
    Shapes: -> [head_dim / 2] float32
    Source: transformers modeling_rope_utils; Megatron's own llama3 scaling fixes three of the four constants.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
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
