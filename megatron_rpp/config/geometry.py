"""What follows from the settings and the shape of the model: every number that a division gives.

Pure arithmetic on integers, with neither torch nor transformers, so that `rpp check` answers at once on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rpp.config.schema import Config, Scalar
from megatron_rpp.hf.model import HfModel


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
    experts_per_rank: int | None  # of one sparse layer; None for a dense model


# Settings of Megatron that split the layers in a way that its own arithmetic checks.
_UNEVEN_SPLITS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def has_even_layers(megatron: Mapping[str, Scalar]) -> bool:
    """Whether model.megatron leaves the layers in equal chunks."""
    return not any(megatron.get(name) for name in _UNEVEN_SPLITS)


def num_optimiser_steps(cfg: Config) -> int:
    """Those of the policy in a whole run: none while a critic warms up."""
    warm_up = cfg.critic.warmup_steps if cfg.algo.estimator == "gae" else 0
    return max(cfg.run.steps - warm_up, 1) * cfg.algo.minibatches


def num_ranks(cfg: Config) -> int:
    """tp x cp x dp x pp."""
    return cfg.parallel.tp * cfg.parallel.cp * cfg.parallel.dp * cfg.parallel.pp


def derive(cfg: Config, hf: HfModel | None = None) -> Geometry:
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
        layers_per_chunk=hf.num_layers // (parallel.pp * parallel.vpp) if hf is not None and has_even_layers(cfg.model.megatron) else None,
        heads_per_rank=hf.num_heads // parallel.tp if hf is not None else None,
        experts_per_rank=hf.experts.num_experts // parallel.ep if hf is not None and hf.experts is not None else None,
    )
