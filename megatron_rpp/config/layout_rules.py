"""Rules between the shape of a model and the layouts of trainer and engine.

`validate` reports every broken rule; the builder of a Megatron model applies the same rules through `check_fit`, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_rpp.config.geometry import has_even_layers
from megatron_rpp.config.problems import Problem
from megatron_rpp.config.schema import Config, Parallel, Scalar
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.hf.experts import ExpertShape, Router
from megatron_rpp.hf.model import HfModel


def check_fit(hf: HfModel, parallel: Parallel, megatron: Mapping[str, Scalar]) -> None:
    """Check that a model fits the trainer. megatron: the settings under model.megatron.

    Raises: GeometryError for the first broken rule of the layout, ConfigError for the first of the router.
    """
    for problem in layout_problems(hf, parallel, megatron):
        raise GeometryError(problem.message, where=problem.path)
    for problem in router_problems(hf, megatron):
        raise ConfigError(problem.message, where=problem.path)


def layout_problems(hf: HfModel, parallel: Parallel, megatron: Mapping[str, Scalar]) -> Iterator[Problem]:
    """What `parallel` cannot divide. Every size of the layout is 1 or more."""
    chunks = parallel.pp * parallel.vpp
    if hf.num_layers % chunks and has_even_layers(megatron):
        message = f"the {hf.num_layers} layers do not divide into pp {parallel.pp} x vpp {parallel.vpp} = {chunks} chunks"
        yield Problem("parallel.pp", f"{message}; or split them with model.megatron.num_layers_in_first_pipeline_stage and ..._last_...")
    yield from _head_problems(hf, "parallel.tp", parallel.tp)
    if hf.dense_layers and hf.ffn_hidden_size % parallel.tp:
        yield Problem("parallel.tp", f"the feed-forward width {hf.ffn_hidden_size} does not divide by {parallel.tp}")
    yield from _expert_problems(hf, parallel)


def _head_problems(hf: HfModel, name: str, parts: int) -> Iterator[Problem]:
    if hf.num_heads % parts:
        yield Problem(name, f"the {hf.num_heads} attention heads do not divide by {parts}")
    if hf.num_kv_heads % parts and parts % hf.num_kv_heads:
        yield Problem(name, f"must divide the {hf.num_kv_heads} key-value heads or be a multiple of them, got {parts}")


def _expert_problems(hf: HfModel, parallel: Parallel) -> Iterator[Problem]:
    share, ranks = parallel.ep * parallel.etp, parallel.tp * parallel.cp * parallel.dp
    if hf.experts is None and share > 1:
        name = "parallel.ep" if parallel.ep > 1 else "parallel.etp"
        yield Problem(name, f"{hf.model_type} has no experts to spread, got ep {parallel.ep} x etp {parallel.etp}; set both to 1")
    elif ranks % share:
        message = f"ep {parallel.ep} x etp {parallel.etp} = {share} must divide the ranks of a stage"
        yield Problem("parallel.ep", f"{message}, tp {parallel.tp} x cp {parallel.cp} x dp {parallel.dp} = {ranks}")
    if hf.experts is not None:
        if hf.experts.num_experts % parallel.ep:
            yield Problem("parallel.ep", f"the {hf.experts.num_experts} experts do not divide by {parallel.ep}")
        if hf.experts.ffn % parallel.etp:
            yield Problem("parallel.etp", f"the width of an expert, {hf.experts.ffn}, does not divide by {parallel.etp}")
        if hf.experts.shared_ffn % parallel.tp:
            yield Problem("parallel.tp", f"the width of the shared expert, {hf.experts.shared_ffn}, does not divide by {parallel.tp}")
    if parallel.tp > 1 and not parallel.sp and (hf.experts is not None or hf.latent is not None):
        what = "experts" if hf.experts is not None else "latent attention"
        yield Problem("parallel.sp", f"{what} with tp {parallel.tp} need sequence parallelism; set true")


def needs_group_choice(router: Router | None, experts: ExpertShape | None) -> bool:
    """Whether the model ranks groups of experts by another rule than Megatron, so that mcore/router.py must choose them.

    Megatron ranks a group by the sum of its best top_k // groups_taken scores.
    """
    if router is None or experts is None or router.num_groups == 1:
        return False
    return router.group_best != experts.top_k // router.groups_taken


def router_problems(hf: HfModel, megatron: Mapping[str, Scalar]) -> Iterator[Problem]:
    """Settings of Megatron that would bypass this project's choice of experts."""
    for name in ("moe_router_fusion", "moe_enable_routing_replay"):
        if megatron.get(name) and needs_group_choice(hf.router, hf.experts):
            message = f"must be false for {hf.model_type}: it bypasses the choice of experts by groups, which Megatron does differently"
            yield Problem(f"model.megatron.{name}", message)


def engine_problems(cfg: Config, hf: HfModel) -> Iterator[Problem]:
    """What the engine cannot run or divide. Sizes of `rollout` are 1 or more."""
    tp = cfg.rollout.tp
    if hf.not_in_engine is not None:
        yield Problem("rollout", hf.not_in_engine)
    yield from _head_problems(hf, "rollout.tp", tp)
    if hf.dense_layers and hf.ffn_hidden_size % tp:
        yield Problem("rollout.tp", f"the feed-forward width {hf.ffn_hidden_size} does not divide by {tp}")
    if hf.experts is not None:
        ep = _size(cfg.rollout.sglang.get("ep_size"))
        if tp % ep:
            yield Problem("rollout.sglang.ep_size", f"must divide rollout.tp {tp}, got {ep}")
        if hf.experts.num_experts % ep:
            yield Problem("rollout.sglang.ep_size", f"the {hf.experts.num_experts} experts do not divide by {ep}")
        if tp % ep == 0 and hf.experts.ffn % (tp // ep):
            yield Problem("rollout.tp", f"the width of an expert, {hf.experts.ffn}, does not divide by {tp // ep}")
        if hf.experts.shared_ffn % tp:
            yield Problem("rollout.tp", f"the width of the shared expert, {hf.experts.shared_ffn}, does not divide by {tp}")


def _size(value: Scalar) -> int:
    """An optional size under rollout.sglang; 1 if it is absent, or of a wrong type, which option_problems reports."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else 1
