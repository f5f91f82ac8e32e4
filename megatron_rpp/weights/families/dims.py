"""Sizes of a decoder, read from an HF config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.hf.model import with_defaults


@dataclass(frozen=True, slots=True)
class Dims:
    """What every layout asks: heads and vocabulary must divide, experts are dealt out. experts: 0 in a dense model.

    ffn is the width of a dense layer, expert_ffn that of one expert. head: of query, key and value where they are as wide.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    is_tied: bool
    experts: int = 0
    expert_ffn: int = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, experts: str | None = None, expert_ffn: str = "moe_intermediate_size") -> Dims:
        """experts, expert_ffn: the keys under which a mixture of experts keeps their number and width.

        Raises: ConfigError naming a key that is missing or is no positive whole number; GeometryError for head counts.
        """
        config = with_defaults(config)
        heads = size(config, "num_attention_heads")
        dims = cls(
            layers=size(config, "num_hidden_layers"),
            hidden=size(config, "hidden_size"),
            ffn=size(config, "intermediate_size"),
            heads=heads,
            # Llama 1 and 2 configs leave out what later ones spell: as many KV heads as heads, hidden = heads x head.
            kv_heads=size(config, "num_key_value_heads", default=heads),
            head=size(config, "head_dim", default=int(config.get("hidden_size") or 0) // heads),
            vocab=size(config, "vocab_size"),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            experts=size(config, experts) if experts else 0,
            expert_ffn=size(config, expert_ffn) if experts else 0,
        )
        if dims.heads % dims.kv_heads:
            raise GeometryError(f"{dims.heads} heads cannot share {dims.kv_heads} KV heads", where="config.json")
        return dims


@dataclass(frozen=True, slots=True)
class Latent:
    """Widths of multi-head latent attention: of the compressed query (None: not compressed) and key-value, and within a head."""

    query: int | None
    key_value: int
    nope: int
    rope: int
    value: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Latent:
        """Raises: ConfigError naming a key that is missing or is no positive whole number."""
        return cls(
            query=None if config.get("q_lora_rank") is None else size(config, "q_lora_rank"),
            key_value=size(config, "kv_lora_rank"),
            nope=size(config, "qk_nope_head_dim"),
            rope=size(config, "qk_rope_head_dim"),
            value=size(config, "v_head_dim"),
        )


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number of the config, or the default where the key is absent or null. Raises: ConfigError."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError("not a size", where=f"config.json: {key}", expected="a positive whole number", got=value)
    return value


def refuse(config: Mapping[str, Any], *keys: str) -> None:
    """Raises ConfigError for an HF switch whose tensors this family does not describe."""
    for key in keys:
        if config.get(key):
            raise ConfigError("not supported by this family", where=f"config.json: {key}", expected="false or absent", got=config[key])
