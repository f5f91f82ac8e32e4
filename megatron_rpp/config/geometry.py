"""What follows from the settings: the model's shape as config.json tells it, and every number that a division gives.

Pure arithmetic on integers, with neither torch nor transformers, so that `rpp check` answers at once on any machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.schema import Config
from megatron_rpp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HfShape:
    """The sizes in an HF config.json that layouts and lengths have to fit."""

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

    @property
    def num_parameters(self) -> int:
        """Weights of a Llama, Qwen2 or Qwen3 of these sizes, all of them; a tied embedding counts once."""
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        if self.model_type == "qwen2":
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)  # biases of q, k and v
        elif self.model_type == "qwen3":
            attention += 2 * self.head_dim  # norms of q and k, one for all heads
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.vocab * self.hidden * (1 if self.is_tied else 2) + self.num_layers * layer + self.hidden


@dataclass(frozen=True, slots=True)
class Geometry:
    """Derived numbers, all exact; made by `derive` from settings that `validate` has accepted."""

    num_ranks: int
    ranks_per_replica: int  # tp x pp x cp: the ranks that together hold one copy of the policy
    num_engines: int
    idle_ranks: int  # ranks that belong to no engine
    responses_per_step: int
    optimiser_steps: int  # of the whole run
    responses_per_optimiser_step: tuple[int, int]  # smallest and largest minibatch
    max_sequence_tokens: int  # longest prompt and longest response together
    layers_per_chunk: int | None  # None without a config.json, or when model.megatron splits the layers unevenly
    heads_per_rank: int | None


# Settings of Megatron that split the layers in a way that its own arithmetic checks.
UNEVEN_SPLITS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def has_even_layers(cfg: Config) -> bool:
    return not any(cfg.model.megatron.get(name) for name in UNEVEN_SPLITS)


def num_ranks(cfg: Config) -> int:
    """tp x cp x dp x pp."""
    return cfg.parallel.tp * cfg.parallel.cp * cfg.parallel.dp * cfg.parallel.pp


def read_hf_shape(directory: Path) -> HfShape:
    """Read `directory`/config.json as plain JSON.

    Raises: ConfigError when it is missing, is not JSON, or lacks a size.
    """
    path = directory / "config.json"
    fix = "point model.hf at a directory with config.json, *.safetensors and the tokenizer's files"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        return HfShape(
            model_type=str(raw["model_type"]),
            num_layers=int(raw["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(raw["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocab=int(raw["vocab_size"]),
            max_positions=int(raw["max_position_embeddings"]),
            is_tied=bool(raw.get("tie_word_embeddings", False)),
        )
    except OSError as error:
        raise ConfigError(f"cannot read the model's config.json: {error.strerror}", where=str(path), fix=fix) from None
    except KeyError as error:
        raise ConfigError(f"config.json has no {error}", where=str(path), fix=fix) from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError("config.json does not describe a decoder", where=str(path), got=error, fix=fix) from None


def derive(cfg: Config, hf: HfShape | None = None) -> Geometry:
    """The numbers that follow from settings which `validate` has accepted."""
    parallel, rollout, algo = cfg.parallel, cfg.rollout, cfg.algo
    ranks = num_ranks(cfg)
    engines = ranks // rollout.tp if rollout.engines is None else rollout.engines
    per_minibatch = [len(range(first, rollout.prompts_per_step, algo.minibatches)) for first in range(algo.minibatches)]
    return Geometry(
        num_ranks=ranks,
        ranks_per_replica=parallel.tp * parallel.pp * parallel.cp,
        num_engines=engines,
        idle_ranks=ranks - engines * rollout.tp,
        responses_per_step=rollout.prompts_per_step * rollout.samples_per_prompt,
        optimiser_steps=cfg.run.steps * algo.minibatches,
        responses_per_optimiser_step=(min(per_minibatch) * rollout.samples_per_prompt, max(per_minibatch) * rollout.samples_per_prompt),
        max_sequence_tokens=cfg.data.max_prompt_tokens + rollout.max_response_tokens,
        layers_per_chunk=hf.num_layers // (parallel.pp * parallel.vpp) if hf is not None and has_even_layers(cfg) else None,
        heads_per_rank=hf.num_heads // parallel.tp if hf is not None else None,
    )
