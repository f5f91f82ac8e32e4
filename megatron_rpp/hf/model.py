"""The description of a model: what a Hugging Face config.json says about a decoder.

Plain JSON and numbers, without torch, megatron or transformers. `rpp check` and the builder of the Megatron model read config.json
here and nowhere else, so both refuse the same models in the same words. Known are Llama (2 and 3), Qwen2 / Qwen2.5, Qwen3,
Qwen2-MoE, Qwen3-MoE, Mixtral, DeepSeek-V2 and DeepSeek-V3. An entry that would change the mathematics and is not understood is
refused, never ignored. An absent entry has the value that transformers gives it for the family, or is refused as missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.errors import ConfigError
from megatron_rpp.hf.engine import engine_limit
from megatron_rpp.hf.entries import Entries, Json
from megatron_rpp.hf.experts import ExpertShape, Router, parse_experts, parse_router
from megatron_rpp.hf.rope import Rope, parse_rope
from megatron_rpp.input_file import read_object


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type means beyond sizes.

    model_type: the name of the family in config.json.
    qkv_bias: the projections to query, key and value have biases.
    qk_norm: every query head and key head is normalized.
    """

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("qwen2", qkv_bias=True),
        Family("qwen3", qk_norm=True),
        Family("qwen2_moe", qkv_bias=True),
        Family("qwen3_moe", qk_norm=True),
        Family("mixtral"),
        Family("deepseek_v2"),
        Family("deepseek_v3"),
    )
}
_QUANTIZATION = ("quantization_config", "compression_config")  # the second is an older name for the same
# The only value of an entry that is implemented; an absent entry means that value.
_SUPPORTED: Json = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,  # of Llama: also puts a bias on the output projection
    "use_sliding_window": False,
    "pretraining_tp": 1,
    **dict.fromkeys(_QUANTIZATION),
}
_DEEPSEEK: Json = {"moe_layer_freq": 1, "rope_interleave": True}
_SUPPORTED_OF: Mapping[str, Json] = {
    "qwen2_moe": {"qkv_bias": True},
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.0},
    # with norm_topk_prob DeepSeek's own code drops the scaling factor, and transformers the normalization
    "deepseek_v2": {**_DEEPSEEK, "scoring_func": "softmax", "norm_topk_prob": False},
    "deepseek_v3": {**_DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}
# What transformers 5.12.1 takes for an absent entry where that does not follow from other entries. SGLang reads config.json through
# transformers, so the engine takes the same.
_ABSENT: Mapping[str, Json] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen2_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 16},
    "qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4},
    "mixtral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "deepseek_v2": {"max_position_embeddings": 2048},
    "deepseek_v3": {"max_position_embeddings": 4096},
}
_UNQUANTIZED = "choose the unquantized model; tools/convert_hf_to_megatron.py and convert_megatron_to_hf.py turn block FP8 into one"
_MAX_LAYERS = 10_000  # the layers of a model are listed one by one
_FIX = "point model.hf at a directory with config.json, *.safetensors and the tokenizer's files"


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Multi-head latent attention.

    q_rank: width of the compressed query, None if queries are not compressed.
    kv_rank: width of the compressed key and value.
    nope_dim: of one head of query and key, the dimensions without rotary embedding.
    rope_dim: of one head of query and key, the dimensions with rotary embedding.
    value_dim: dimensions of one head of the value.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def num_parameters(self, hidden: int, heads: int) -> int:
        """Weights of the attention of one layer, its norms included."""
        queries = heads * (self.nope_dim + self.rope_dim)
        query = hidden * queries if self.q_rank is None else self.q_rank * (hidden + 1 + queries)
        key_value = hidden * (self.kv_rank + self.rope_dim) + self.kv_rank * (1 + heads * (self.nope_dim + self.value_dim))
        return query + key_value + heads * self.value_dim * hidden


@dataclass(frozen=True, slots=True)
class HfModel:
    """The shape of a model. Checkpoints keep its fields in their headers: a new or renamed field makes old ones unreadable.

    ffn_hidden_size: width of the dense layers.
    num_kv_heads, head_dim: of ordinary attention.
    max_positions: the longest sequence that the model was made for.
    experts, router: None for a dense model.
    latent: None for ordinary attention.
    """

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
    experts: ExpertShape | None = None
    router: Router | None = None
    latent: LatentShape | None = None

    @property
    def model_type(self) -> str:
        return self.family.model_type

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers with one feed-forward network for all tokens."""
        is_sparse = self.experts.is_sparse if self.experts is not None else ()
        return tuple(n for n in range(self.num_layers) if not is_sparse or not is_sparse[n])

    @property
    def not_in_engine(self) -> str | None:
        """Why SGLang cannot run this model; None if it can."""
        return engine_limit(self.model_type, is_tied=self.is_tied, dense_layers=self.dense_layers)

    @property
    def num_parameters(self) -> int:
        """All weights, as transformers counts them: a tied embedding once, and no biases of routers."""
        dense = len(self.dense_layers)
        total = self.num_layers * (self._attention + 2 * self.hidden_size) + dense * 3 * self.hidden_size * self.ffn_hidden_size
        if self.experts is not None:
            total += (self.num_layers - dense) * self.experts.num_parameters(self.hidden_size)
        return self.vocab_size * self.hidden_size * (1 if self.is_tied else 2) + total + self.hidden_size

    @property
    def _attention(self) -> int:
        if self.latent is not None:
            return self.latent.num_parameters(self.hidden_size, self.num_heads)
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        if self.family.qkv_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        if self.family.qk_norm:
            attention += 2 * self.head_dim  # one norm for all query heads, one for all key heads
        return attention


def read_model(directory: Path, *, for_engine: bool = False) -> HfModel:
    """Read and check `directory`/config.json.

    for_engine: only SGLang reads the weights, so they may be quantized.
    Raises: ConfigError naming the file and the entry, for a missing file, an unknown model_type, a size that is missing or wrong, or
    a setting that is not implemented (sliding windows, other activations, other rotary scalings, biases, quantized weights, other
    ways of choosing experts).
    """
    path = Path(directory) / "config.json"
    raw = read_object(path, ConfigError, fix=_FIX)
    if for_engine:
        raw = {name: value for name, value in raw.items() if name not in _QUANTIZATION}
    return parse_model(raw, where=str(path))


def parse_model(raw: Any, *, where: str) -> HfModel:
    """The checks and the meaning of `read_model`, on the parsed file. where: the file, for messages."""
    if not isinstance(raw, Mapping):
        raise ConfigError("config.json does not hold a JSON object", where=where, got=type(raw).__name__, fix=_FIX)
    entries = Entries(with_defaults(raw), where)
    family = _family(entries)
    _refuse_unknown_mathematics(entries, family)
    num_layers, heads = entries.size("num_hidden_layers", most=_MAX_LAYERS), entries.size("num_attention_heads")
    hidden, latent = entries.size("hidden_size"), _latent(entries)
    experts = parse_experts(entries, num_layers)
    return HfModel(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=entries.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads if latent is not None else _kv_heads(entries, heads, is_absent="num_key_value_heads" not in raw),
        head_dim=entries.size("head_dim", default=hidden // heads),
        vocab_size=entries.size("vocab_size"),
        norm_eps=entries.number("rms_norm_eps", default=1e-6),
        is_tied=entries.flag("tie_word_embeddings"),
        max_positions=entries.size("max_position_embeddings"),
        rope=parse_rope(entries, is_latent=latent is not None, default_theta=1e4),
        experts=experts,
        router=None if experts is None else parse_router(entries, experts),
        latent=latent,
    )


def with_defaults(raw: Json) -> dict[str, Any]:
    """A config.json with what its family takes for entries that are absent and do not follow from others."""
    model_type = raw.get("model_type")
    return {**(_ABSENT.get(model_type, {}) if isinstance(model_type, str) else {}), **raw}


def _family(entries: Entries) -> Family:
    model_type = entries.values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        is_multimodal = any(name in entries.values for name in ("text_config", "vision_config", "audio_config"))
        raise ConfigError(
            "this model family is not supported",
            where=entries.at("model_type"),
            expected=" | ".join(FAMILIES),
            got="nothing" if model_type is None else model_type,
            fix="choose a text-only model; this one also takes images or sound" if is_multimodal else None,
        )
    return family


def _kv_heads(entries: Entries, heads: int, *, is_absent: bool) -> int:
    kv_heads = entries.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        origin = "; config.json has no such entry, and this is transformers' default" if is_absent else ""
        raise ConfigError(
            "the attention heads do not divide into groups",
            where=entries.at("num_key_value_heads"),
            expected=f"a divisor of the {heads} attention heads",
            got=f"{kv_heads}{origin}",
        )
    return kv_heads


def _latent(entries: Entries) -> LatentShape | None:
    """The latent attention of a config.json, None for ordinary heads."""
    if entries.values["model_type"] not in ("deepseek_v2", "deepseek_v3"):
        return None
    if "q_lora_rank" not in entries.values:
        raise ConfigError("this entry is missing", where=entries.at("q_lora_rank"), expected="a positive whole number, or null")
    return LatentShape(
        q_rank=None if entries.values["q_lora_rank"] is None else entries.size("q_lora_rank"),
        kv_rank=entries.size("kv_lora_rank"),
        nope_dim=entries.size("qk_nope_head_dim"),
        rope_dim=entries.size("qk_rope_head_dim"),
        value_dim=entries.size("v_head_dim"),
    )


def _refuse_unknown_mathematics(entries: Entries, family: Family) -> None:
    """Entries whose other values are not implemented. An absent or null entry means the supported value."""
    supported = {**_SUPPORTED, **_SUPPORTED_OF.get(family.model_type, {})}
    if family.qkv_bias:
        del supported["attention_bias"]  # Qwen2 has its three biases whatever the file says
    for name, wanted in supported.items():
        value = entries.values.get(name, wanted)
        if value is not None and value != wanted:
            fix = _UNQUANTIZED if name in _QUANTIZATION else None
            expected, got = _as_json(wanted), _as_json(value)
            raise ConfigError("this setting is not supported", where=entries.at(name), expected=expected, got=got, fix=fix)
    other_layers = sorted({str(kind) for kind in entries.items("layer_types")} - {"full_attention"})
    if other_layers:
        raise ConfigError(
            "these layers are not supported", where=entries.at("layer_types"), expected="full_attention", got=", ".join(other_layers)
        )


def _as_json(value: Any) -> str:
    """A value as it stands in the file."""
    return json.dumps(value)
