"""The sizes in a Hugging Face config.json: those of the decoder, of its experts, and of its latent attention.

Plain JSON and integers, with neither torch nor transformers: `rpp check` counts weights with it, and the builder of the model
reads the same sizes from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.errors import ConfigError

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The mixture-of-experts layers of a model.

    top_k: experts that each token takes. ffn: width of one expert. shared_ffn: width of the expert that every token takes
    besides, 0 where there is none; has_shared_gate: it is weighed by a gate of its own. is_sparse: for every layer, whether it
    has experts; the others are dense.
    """

    num_experts: int
    top_k: int
    ffn: int
    shared_ffn: int
    has_shared_gate: bool
    is_sparse: tuple[bool, ...]

    def num_parameters(self, hidden: int) -> int:
        """Weights of one sparse layer: router, experts, shared expert and its gate. Biases of a router are no parameters."""
        gate = hidden if self.has_shared_gate else 0
        return self.num_experts * hidden + 3 * hidden * (self.num_experts * self.ffn + self.shared_ffn) + gate


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Multi-head latent attention. q_rank: None where queries are projected at once. Dimensions are those of one head:
    nope_dim without and rope_dim with rotary embedding, of query and key alike; value_dim of the value."""

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
class HfShape:
    """The sizes in an HF config.json that layouts and lengths have to fit. ffn: width of the dense layers."""

    model_type: str
    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    is_tied: bool
    experts: ExpertShape | None = None
    latent: LatentShape | None = None

    @property
    def has_dense_layers(self) -> bool:
        """True where some layer has one feed-forward network for all tokens."""
        return self.experts is None or not all(self.experts.is_sparse)

    @property
    def num_parameters(self) -> int:
        """Weights of a model of a known family of these sizes, all of them; a tied embedding counts once."""
        num_sparse = sum(self.experts.is_sparse) if self.experts is not None else 0
        total = self.num_layers * (self._attention + 2 * self.hidden) + (self.num_layers - num_sparse) * 3 * self.hidden * self.ffn
        if self.experts is not None:
            total += num_sparse * self.experts.num_parameters(self.hidden)
        return self.vocab * self.hidden * (1 if self.is_tied else 2) + total + self.hidden

    @property
    def _attention(self) -> int:
        if self.latent is not None:
            return self.latent.num_parameters(self.hidden, self.num_heads)
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        if self.model_type in ("qwen2", "qwen2_moe"):
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)  # biases of q, k and v
        elif self.model_type in ("qwen3", "qwen3_moe"):
            attention += 2 * self.head_dim  # norms of q and k, one for all heads
        return attention


def read_hf_shape(directory: Path) -> HfShape:
    """Read `directory`/config.json as plain JSON.

    Raises: ConfigError when it is missing, is not JSON, or lacks a size.
    """
    path = directory / "config.json"
    fix = "point model.hf at a directory with config.json, *.safetensors and the tokenizer's files"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        latent = read_latent(raw)
        return HfShape(
            model_type=str(raw["model_type"]),
            num_layers=int(raw["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(raw["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=heads if latent is not None else int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocab=int(raw["vocab_size"]),
            max_positions=int(raw["max_position_embeddings"]),
            is_tied=bool(raw.get("tie_word_embeddings", False)),
            experts=read_experts(raw),
            latent=latent,
        )
    except OSError as error:
        raise ConfigError(f"cannot read the model's config.json: {error.strerror}", where=str(path), fix=fix) from None
    except KeyError as error:
        raise ConfigError(f"config.json has no {error}", where=str(path), fix=fix) from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError("config.json does not describe a decoder", where=str(path), got=error, fix=fix) from None


def read_experts(raw: Json) -> ExpertShape | None:
    """The experts of a config, None for a dense model. Raises: KeyError for a size that is missing."""
    match raw["model_type"]:
        case "mixtral":
            shape = _mixtral(raw)
        case "qwen2_moe" | "qwen3_moe":
            shape = _qwen(raw)
        case "deepseek_v2" | "deepseek_v3":
            shape = _deepseek(raw)
        case _:
            return None
    return shape if any(shape.is_sparse) else None


def _mixtral(raw: Json) -> ExpertShape:
    return ExpertShape(
        num_experts=int(raw["num_local_experts"]),
        top_k=int(raw["num_experts_per_tok"]),
        ffn=int(raw["intermediate_size"]),
        shared_ffn=0,
        has_shared_gate=False,
        is_sparse=(True,) * int(raw["num_hidden_layers"]),
    )


def _qwen(raw: Json) -> ExpertShape:
    # transformers 5 writes Qwen3's number under the name that Mixtral's has
    count = int(raw["num_local_experts"] if "num_experts" not in raw and "num_local_experts" in raw else raw["num_experts"])
    dense, step = set(raw.get("mlp_only_layers") or ()), int(raw.get("decoder_sparse_step") or 1)
    shared = int(raw["shared_expert_intermediate_size"]) if raw["model_type"] == "qwen2_moe" else 0
    return ExpertShape(
        num_experts=count,
        top_k=int(raw["num_experts_per_tok"]),
        ffn=int(raw["moe_intermediate_size"]),
        shared_ffn=shared,
        has_shared_gate=shared > 0,
        is_sparse=tuple(count > 0 and n not in dense and (n + 1) % step == 0 for n in range(int(raw["num_hidden_layers"]))),
    )


def _deepseek(raw: Json) -> ExpertShape:
    # a config without routed experts (null) is a dense model with latent attention
    count, ffn = int(raw["n_routed_experts"] or 0), int(raw["moe_intermediate_size"])
    first = int(raw["first_k_dense_replace"] or 0)
    return ExpertShape(
        num_experts=count,
        top_k=int(raw["num_experts_per_tok"] or 0),
        ffn=ffn,
        shared_ffn=int(raw["n_shared_experts"] or 0) * ffn,
        has_shared_gate=False,
        is_sparse=tuple(count > 0 and n >= first for n in range(int(raw["num_hidden_layers"]))),
    )


def read_latent(raw: Json) -> LatentShape | None:
    """The latent attention of a config, None where it has ordinary heads. Raises: KeyError for a size that is missing."""
    if raw["model_type"] not in ("deepseek_v2", "deepseek_v3"):
        return None
    return LatentShape(
        q_rank=None if raw["q_lora_rank"] is None else int(raw["q_lora_rank"]),
        kv_rank=int(raw["kv_lora_rank"]),
        nope_dim=int(raw["qk_nope_head_dim"]),
        rope_dim=int(raw["qk_rope_head_dim"]),
        value_dim=int(raw["v_head_dim"]),
    )
