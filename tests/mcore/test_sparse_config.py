"""config.json of models with experts or latent attention: what is understood, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rpp.config.layout_rules import check_fit
from megatron_rpp.config.schema import Parallel
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.hf.experts import Router
from megatron_rpp.hf.model import LatentShape, parse_model
from megatron_rpp.mcore.router import GroupChoice
from megatron_rpp.mcore.shape import shape_settings
from tests.mcore import sparse
from tests.mcore.hf import transformers


def raw(kind: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a kind in sparse.MODELS with some entries changed; ... removes one."""
    family, sizes = sparse.MODELS[kind]
    config = {**getattr(transformers(), f"{family}Config")(**sizes).to_dict(), **changes}
    return {name: value for name, value in config.items() if value is not ...}


def parse(kind: str, **changes: Any):
    return parse_model(raw(kind, **changes), where="config.json")


@pytest.mark.parametrize(
    ("kind", "changes", "router", "is_sparse"),
    [
        ("qwen3_moe", {}, Router("softmax", renormalise=True), [1, 0, 1, 1]),
        ("qwen3_moe", dict(decoder_sparse_step=3, mlp_only_layers=[]), Router("softmax", renormalise=True), [0, 0, 1, 0]),
        ("qwen2_moe", {}, Router("softmax", renormalise=False), [0, 1, 0, 1]),
        ("mixtral", {}, Router("softmax", renormalise=True), [1, 1, 1, 1]),
        ("deepseek_v3", {}, Router("sigmoid", True, 2.5, True, num_groups=4, groups_taken=2, group_best=2), [0, 1, 1, 1]),
        ("deepseek_v3", dict(n_group=1, topk_group=1), Router("sigmoid", True, 2.5, True), [0, 1, 1, 1]),
        ("deepseek_v2 lite", {}, Router("softmax", False), [0, 1, 1, 1]),
        ("deepseek_v2", {}, Router("softmax", False, 4.0, num_groups=4, groups_taken=2, group_best=1), [0, 1, 1, 1]),
    ],
)
def test_routers_and_sparse_layers_are_read(kind: str, changes: dict[str, Any], router: Router, is_sparse: list[int]) -> None:
    model = parse(kind, **changes)
    assert model.router == router
    assert model.experts.is_sparse == tuple(map(bool, is_sparse))
    settings = shape_settings(model)
    assert settings["moe_layer_freq"] == is_sparse
    assert settings["moe_router_pre_softmax"] is (router.score == "softmax" and not router.renormalise)
    assert settings["moe_aux_loss_coeff"] == settings["moe_router_bias_update_rate"] == 0.0


def test_latent_attention_and_yarn_are_read() -> None:
    model = parse("deepseek_v3")
    assert model.latent == LatentShape(q_rank=24, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=12)
    assert (model.rope.type, model.rope.factor, model.rope.mscale, model.rope.mscale_all_dim) == ("yarn", 4.0, 0.707, 0.707)
    assert parse("deepseek_v2 lite").latent.q_rank is None
    one = parse("deepseek_v3", rope_parameters={**sparse.YARN, "mscale_all_dim": None}).rope
    assert (one.mscale, one.mscale_all_dim) == (1.0, 0.0), "mscale alone is not looked at, as in transformers"
    plain = shape_settings(parse("deepseek_v3", rope_parameters=None, rope_theta=5e4))
    assert (plain["rope_type"], plain["rotary_base"], plain["rotary_scaling_factor"]) == ("rope", 5e4, 1.0)
    assert parse("mixtral", rope_parameters=None).rope.theta == 1e6
    assert parse("qwen3_moe", mlp_only_layers=[0, 1, 2, 3]).experts is None


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("qwen2_moe", dict(qkv_bias=False), ["qkv_bias", "true"]),
        ("qwen3_moe", dict(attention_bias=True), ["attention_bias"]),
        ("qwen3_moe", dict(num_experts_per_tok=9), ["num_experts_per_tok", "1 to 8"]),
        ("qwen3_moe", dict(moe_intermediate_size=...), ["moe_intermediate_size", "missing"]),
        ("mixtral", dict(sliding_window=4096), ["sliding_window", "4096"]),
        ("mixtral", dict(router_jitter_noise=0.1), ["router_jitter_noise"]),
        ("deepseek_v3", dict(scoring_func="softmax"), ["scoring_func", "sigmoid", "softmax"]),
        ("deepseek_v3", dict(topk_method="greedy"), ["topk_method", "noaux_tc"]),
        ("deepseek_v3", dict(norm_topk_prob=False), ["norm_topk_prob"]),
        ("deepseek_v3", dict(rope_interleave=False), ["rope_interleave"]),
        ("deepseek_v3", dict(moe_layer_freq=2), ["moe_layer_freq"]),
        ("deepseek_v3", dict(num_experts_per_tok=5), ["num_experts_per_tok", "1 to 4"]),
        ("deepseek_v3", dict(num_experts_per_tok=1), ["num_experts_per_tok", "2 or more"]),
        ("deepseek_v3", dict(n_group=3), ["n_group", "3"]),
        ("deepseek_v3", dict(n_group=...), ["n_group", "missing"]),
        ("deepseek_v3", dict(first_k_dense_replace=...), ["first_k_dense_replace", "missing"]),
        ("deepseek_v3", dict(quantization_config=dict(quant_method="fp8")), ["quantization_config"]),
        ("deepseek_v3", dict(rope_parameters={**sparse.YARN, "attention_factor": 2.0}), ["attention_factor"]),
        ("deepseek_v3", dict(rope_parameters={**sparse.YARN, "mscale": None}), ["mscale_all_dim without mscale"]),
        ("deepseek_v3", dict(rope_parameters={**sparse.YARN, "rope_type": "llama3"}), ["llama3", "yarn"]),
        ("deepseek_v2", dict(norm_topk_prob=True), ["norm_topk_prob"]),
        ("deepseek_v2", dict(topk_method="random"), ["topk_method", "random"]),
        ("deepseek_v2", dict(topk_method="noaux_tc"), ["topk_method", "noaux_tc"]),  # its class in transformers has no such bias
        ("qwen3_moe", dict(rope_scaling=dict(rope_type="yarn", factor=4.0), rope_parameters=None), ["yarn"]),
        (
            "deepseek_v3",
            dict(rope_scaling=sparse.YARN, rope_parameters=dict(rope_type="default")),
            ["contradict each other", "yarn", "default"],
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(kind: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(kind, **changes)
    assert all(word in str(error.value) for word in ["config.json", *words])


@pytest.mark.parametrize(
    ("kind", "changes", "sizes", "words"),
    [
        ("qwen3_moe", dict(mlp_only_layers=[0, 1, 2, 3]), dict(ep=2), ["parallel.ep", "no experts", "ep 2 x etp 1"]),
        ("qwen3_moe", {}, dict(ep=3, dp=3), ["parallel.ep", "8 experts"]),
        ("qwen3_moe", {}, dict(etp=3, dp=3), ["parallel.etp", "the width of an expert, 32,"]),
        ("qwen2_moe", dict(shared_expert_intermediate_size=50), dict(tp=4), ["parallel.tp", "the width of the shared expert, 50,"]),
        ("mixtral", {}, dict(tp=2, sp=False), ["parallel.sp", "experts"]),
        ("deepseek_v3", dict(first_k_dense_replace=4), dict(tp=2, sp=False), ["parallel.sp", "latent attention"]),
    ],
)
def test_layouts_that_experts_do_not_fit_are_refused(kind: str, changes: dict[str, Any], sizes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(GeometryError) as error:
        check_fit(parse(kind, **changes), Parallel(**sizes), {})
    assert all(word in str(error.value) for word in words)
    check_fit(parse("qwen3_moe", intermediate_size=97, mlp_only_layers=[]), Parallel(tp=2, ep=2), {})  # no layer has that width


@pytest.mark.parametrize("best", [1, 2, 3])
def test_experts_are_chosen_from_the_best_groups(best: int) -> None:
    """Against a loop over tokens that does what the papers write."""
    scores_TE = torch.randn(50, 12, generator=torch.Generator().manual_seed(best))
    values, indices = GroupChoice(best).get_replay_topk(scores_TE, 4, 4, 2)
    for scores_E, got_values, got in zip(scores_TE.tolist(), values.tolist(), indices.tolist(), strict=True):
        groups = [scores_E[start : start + 3] for start in (0, 3, 6, 9)]
        worth = [sum(sorted(group, reverse=True)[:best]) for group in groups]
        taken = sorted(range(4), key=lambda g: -worth[g])[:2]
        allowed = [3 * g + e for g in taken for e in range(3)]
        assert got == sorted(allowed, key=lambda e: -scores_E[e])[:4]
        assert got_values == [scores_E[e] for e in got]
