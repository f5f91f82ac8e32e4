"""Rotary position embedding as a config.json describes it. The frequencies themselves are computed in mcore/rope.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rpp.errors import ConfigError
from megatron_rpp.hf.entries import Entries, Json

_TYPES = ("default", "linear", "llama3")
_LATENT_TYPES = ("default", "yarn")
# The numbers that a scaling depends on. transformers has no default for them either.
_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings of a config, in the form that both transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) mean.

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


def parse_rope(entries: Entries, *, is_latent: bool, default_theta: float) -> Rope:
    """The rotary settings of a config.json.

    is_latent: for latent attention, which knows other scalings than ordinary heads.
    Raises: ConfigError naming the entry that is not understood.
    """
    raw, where = entries.values, entries.where
    old, new = _settings(entries, "rope_scaling"), _settings(entries, "rope_parameters")
    if old and new and _kind(old) != _kind(new):  # readers differ in which of the two they take
        raise ConfigError(
            "rope_scaling and rope_parameters contradict each other",
            where=where,
            expected="rope_scaling or rope_parameters, or both of one type",
            got=f"rope_scaling {_kind(old)}, rope_parameters {_kind(new)}",
            fix="remove the one that the model was not trained with",
        )
    name = "rope_parameters" if new else "rope_scaling"
    inner = Entries({**old, **new}, f"{where}: {name}")
    kind = _kind(inner.values)
    known = _LATENT_TYPES if is_latent else _TYPES
    if kind not in known:
        raise ConfigError("this rotary scaling is not supported", where=inner.where, expected=" | ".join(known), got=kind)
    partial = inner.number("partial_rotary_factor", default=entries.number("partial_rotary_factor", default=1.0))
    if partial != 1.0:
        where = entries.at("partial_rotary_factor")
        raise ConfigError("partial rotary embeddings are not supported", where=where, expected=1.0, got=partial)
    for entry in _REQUIRED.get(kind, ()):
        inner.number(entry)
    if kind in ("llama3", "yarn"):
        inner.size("original_max_position_embeddings")
    rope = Rope(
        theta=inner.number("rope_theta", default=entries.number("rope_theta", default=default_theta)),
        type=kind,
        factor=inner.number("factor", default=1.0),
        low_freq_factor=inner.number("low_freq_factor", default=1.0),
        high_freq_factor=inner.number("high_freq_factor", default=4.0),
        original_max_positions=inner.size("original_max_position_embeddings", default=raw.get("max_position_embeddings") or 8192),
    )
    return _with_yarn(rope, inner) if kind == "yarn" else rope


def _settings(entries: Entries, name: str) -> Json:
    """The object under `name`, empty if there is none. transformers 5 can write one such object per layer type."""
    found = entries.values.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError("this entry is not an object", where=entries.at(name), expected="rope_type, rope_theta, ...", got=repr(found))
    by_layer_type = [key for key, value in found.items() if isinstance(value, Mapping)]
    if by_layer_type:
        raise ConfigError(
            "rotary settings per layer type are not supported",
            where=entries.at(name),
            expected='one set for all layers, such as {"rope_type": "default", "rope_theta": 10000.0}',
            got=f"a set each for {', '.join(by_layer_type)}",
            fix="if the model has only full attention, move the settings of full_attention up one level",
        )
    return found


def _kind(settings: Json) -> Any:
    kind = settings.get("rope_type", settings.get("type"))
    return "default" if kind is None else kind


def _with_yarn(rope: Rope, entries: Entries) -> Rope:
    """The entries of yarn, as transformers reads them: mscale has an effect only together with mscale_all_dim."""
    for name, wanted in (("attention_factor", None), ("truncate", True)):
        if entries.values.get(name, wanted) != wanted:
            raise ConfigError("this setting is not supported", where=entries.at(name), expected=wanted, got=entries.values[name])
    mscale, all_dim = entries.number("mscale", default=0.0), entries.number("mscale_all_dim", default=0.0)
    if all_dim and not mscale:
        raise ConfigError("mscale_all_dim without mscale is not supported", where=entries.where, got=all_dim)
    return Rope(
        theta=rope.theta,
        type=rope.type,
        factor=rope.factor,
        original_max_positions=rope.original_max_positions,
        beta_fast=entries.number("beta_fast", default=0.0) or 32.0,
        beta_slow=entries.number("beta_slow", default=0.0) or 1.0,
        mscale=mscale if all_dim else 1.0,
        mscale_all_dim=all_dim,
    )
