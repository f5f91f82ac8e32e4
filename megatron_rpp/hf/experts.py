"""Mixtures of experts in a config.json: their sizes, and how the experts of a token are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_rpp.errors import ConfigError
from megatron_rpp.hf.entries import Entries


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The mixture-of-experts layers of a model.

    num_experts: routed experts of one layer.
    top_k: experts that each token takes.
    ffn: width of one expert.
    shared_ffn: width of the expert that every token takes as well, 0 if there is none.
    has_shared_gate: the shared expert is weighted by its own gate.
    is_sparse: for every layer, whether it has experts; the other layers are dense.
    """

    num_experts: int
    top_k: int
    ffn: int
    shared_ffn: int
    has_shared_gate: bool
    is_sparse: tuple[bool, ...]

    def num_parameters(self, hidden: int) -> int:
        """Weights of one sparse layer: router, experts, shared expert and its gate. A router's bias is not a parameter."""
        gate = hidden if self.has_shared_gate else 0
        return self.num_experts * hidden + 3 * hidden * (self.num_experts * self.ffn + self.shared_ffn) + gate


@dataclass(frozen=True, slots=True)
class Router:
    """How the experts of a token are chosen and weighted.

    score: of all experts together (softmax) or of each alone (sigmoid).
    renormalise: the weights of the chosen experts sum to scale; otherwise they are scores times scale.
    has_bias: experts are chosen by score + bias and weighted by score.
    num_groups: if more than 1, only the experts of the best groups_taken groups can be chosen.
    group_best: a group is ranked by the sum of its best group_best scores.
    """

    score: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float = 1.0
    has_bias: bool = False
    num_groups: int = 1
    groups_taken: int = 1
    group_best: int = 1


def parse_experts(entries: Entries, num_layers: int) -> ExpertShape | None:
    """The experts of a config.json, None for a dense model. Raises: ConfigError for a size that is missing or wrong."""
    match entries.values["model_type"]:
        case "mixtral":
            shape = _mixtral(entries, num_layers)
        case "qwen2_moe" | "qwen3_moe":
            shape = _qwen(entries, num_layers)
        case "deepseek_v2" | "deepseek_v3":
            shape = _deepseek(entries, num_layers)
        case _:
            return None
    return shape if any(shape.is_sparse) else None


def _mixtral(entries: Entries, num_layers: int) -> ExpertShape:
    return ExpertShape(
        num_experts=entries.size("num_local_experts"),
        top_k=entries.size("num_experts_per_tok"),
        ffn=entries.size("intermediate_size"),
        shared_ffn=0,
        has_shared_gate=False,
        is_sparse=(True,) * num_layers,
    )


def _qwen(entries: Entries, num_layers: int) -> ExpertShape:
    raw = entries.values
    # transformers 5 writes the number of Qwen3's experts under Mixtral's name
    count = entries.count("num_local_experts" if "num_experts" not in raw and "num_local_experts" in raw else "num_experts")
    dense, step = entries.layers("mlp_only_layers"), entries.size("decoder_sparse_step", default=1)
    shared = entries.size("shared_expert_intermediate_size") if raw["model_type"] == "qwen2_moe" else 0
    return ExpertShape(
        num_experts=count,
        top_k=entries.size("num_experts_per_tok"),
        ffn=entries.size("moe_intermediate_size"),
        shared_ffn=shared,
        has_shared_gate=shared > 0,
        is_sparse=tuple(count > 0 and n not in dense and (n + 1) % step == 0 for n in range(num_layers)),
    )


def _deepseek(entries: Entries, num_layers: int) -> ExpertShape:
    # a config without routed experts (null) is a dense model with latent attention
    count, ffn = entries.count("n_routed_experts"), entries.size("moe_intermediate_size")
    first = entries.count("first_k_dense_replace")
    return ExpertShape(
        num_experts=count,
        top_k=entries.count("num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=entries.count("n_shared_experts") * ffn,
        has_shared_gate=False,
        is_sparse=tuple(count > 0 and n >= first for n in range(num_layers)),
    )


def parse_router(entries: Entries, experts: ExpertShape) -> Router:
    """The router of a model with experts.

    Raises: ConfigError for a number of experts or groups that cannot be, and for a way of choosing that is not known.
    Source: the routers of transformers' modeling files, and DeepSeek's own where the two differ.
    """
    match entries.values["model_type"]:
        case "mixtral":
            router = Router("softmax", renormalise=True)
        case "deepseek_v2":
            scale = entries.number("routed_scaling_factor", default=1.0)
            router = Router("softmax", renormalise=False, scale=scale, **_groups(entries, best=1))
        case "deepseek_v3":
            scale = entries.number("routed_scaling_factor")
            router = Router("sigmoid", renormalise=True, scale=scale, has_bias=True, **_groups(entries, best=2))
        case _:
            router = Router("softmax", renormalise=entries.flag("norm_topk_prob"))
    _check_choice(entries, experts, router)
    return router


def _check_choice(entries: Entries, experts: ExpertShape, router: Router) -> None:
    if router.score == "sigmoid" and experts.top_k == 1:
        raise ConfigError("one expert per token is not supported", where=entries.at("num_experts_per_tok"), expected="2 or more", got=1)
    if experts.num_experts % router.num_groups:
        expected = f"a divisor of the {experts.num_experts} experts"
        raise ConfigError("the experts do not divide into groups", where=entries.at("n_group"), expected=expected, got=router.num_groups)
    if not 1 <= router.groups_taken <= router.num_groups:
        expected = f"1 to {router.num_groups}, the number of groups"
        raise ConfigError("impossible number of groups", where=entries.at("topk_group"), expected=expected, got=router.groups_taken)
    open_to_choice = experts.num_experts // router.num_groups * router.groups_taken
    if not 1 <= experts.top_k <= open_to_choice:
        expected = f"1 to {open_to_choice}, the experts that a token can choose from"
        where = entries.at("num_experts_per_tok")
        raise ConfigError("impossible number of experts per token", where=where, expected=expected, got=experts.top_k)


def _groups(entries: Entries, *, best: int) -> dict[str, Any]:
    """The restriction to groups of experts; empty if all groups may be taken. DeepSeek-V2 says so in topk_method."""
    is_v2 = entries.values["model_type"] == "deepseek_v2"
    known = ("greedy", "group_limited_greedy") if is_v2 else ("noaux_tc",)
    method = entries.values.get("topk_method", known[0])
    if method not in known:
        raise ConfigError(
            "this way of choosing experts is not supported", where=entries.at("topk_method"), expected=" | ".join(known), got=method
        )
    if method == "greedy":
        return {}
    groups, taken = entries.count("n_group") or 1, entries.count("topk_group") or 1
    if groups == taken:
        return {}
    return {"num_groups": groups, "groups_taken": taken, "group_best": best}
