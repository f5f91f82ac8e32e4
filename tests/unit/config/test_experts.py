"""Models with experts or latent attention: their sizes, and what they ask of a layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.load import load
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.hf.model import read_model
from tests.unit.config.conftest import QWEN

ROUTER = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
QWEN3_MOE = {
    **QWEN, "tie_word_embeddings": False,
    "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "intermediate_size": 130,
}  # fmt: skip
DEEPSEEK = {
    **QWEN, "tie_word_embeddings": False,
    "model_type": "deepseek_v3", "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36,
    "first_k_dense_replace": 4, "n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, **ROUTER,
}  # fmt: skip


def count(tmp_path: Path, config: dict[str, Any]) -> int:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_model(tmp_path).num_parameters


def test_the_parameter_count_is_that_of_real_models(tmp_path: Path) -> None:
    """Qwen3-235B-A22B and DeepSeek-V3 (without the layer that predicts two tokens ahead), as their safetensors add up."""
    qwen = {
        "model_type": "qwen3_moe", "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    deepseek = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128,
        "vocab_size": 129280, "max_position_embeddings": 163840, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, **ROUTER,
    }  # fmt: skip
    assert count(tmp_path, qwen) == 235_093_634_560
    assert count(tmp_path, deepseek) == 671_026_404_352


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16, "n_shared_experts": 2, **ROUTER,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "more", "wanted"),
    [
        ("qwen3_moe", {**EXPERTS, "head_dim": 24, "mlp_only_layers": [1]}, 267_520),
        ("qwen3_moe", {**EXPERTS, "head_dim": 24}, 298_752),
        ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}, 230_592),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 371_264),
        ("deepseek_v3", {**LATENT, "q_lora_rank": 24}, 282_912),
        ("deepseek_v2", {**LATENT, "q_lora_rank": None}, 292_032),
    ],
)
def test_the_parameter_count_of_each_family_is_that_of_transformers(
    tmp_path: Path, model_type: str, more: dict[str, Any], wanted: int
) -> None:
    """`wanted` is what transformers 5.12.1 allocates for 4 layers of these sizes."""
    sizes = {"model_type": model_type, "vocab_size": 200, "intermediate_size": 96, "tie_word_embeddings": False}
    assert count(tmp_path, {**QWEN, **sizes, **more}) == wanted


def test_transformers_other_name_for_the_number_of_experts_is_read(tmp_path: Path) -> None:
    renamed = {("num_local_experts" if name == "num_experts" else name): value for name, value in QWEN3_MOE.items()}
    assert count(tmp_path, renamed) == count(tmp_path, QWEN3_MOE)


def test_a_size_of_the_experts_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moe_intermediate_size"):
        count(tmp_path, {name: value for name, value in QWEN3_MOE.items() if name != "moe_intermediate_size"})


def check(project: Path, config: dict[str, Any], *overrides: str) -> Any:
    (project.parent / "model/config.json").write_text(json.dumps(config))
    return validate(load(project, overrides)).geometry


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (QWEN, ["parallel.ep=2", "parallel.dp=2"], "parallel.ep: qwen2 has no experts to spread"),
        (QWEN, ["parallel.etp=2", "parallel.dp=2"], "parallel.etp: qwen2 has no experts to spread"),
        (DEEPSEEK, ["parallel.ep=2", "parallel.dp=2"], "parallel.ep: deepseek_v3 has no experts to spread"),  # all layers are dense
        (QWEN3_MOE, ["parallel.ep=4", "parallel.dp=4"], "parallel.ep: the 6 experts do not divide by 4"),
        (QWEN3_MOE, ["parallel.ep=2"], "parallel.ep: ep 2 x etp 1 = 2 must divide the ranks of a stage, tp 1 x cp 1 x dp 1 = 1"),
        (QWEN3_MOE, ["parallel.etp=8", "parallel.dp=8"], "parallel.etp: the width of an expert, 36, does not divide by 8"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, ["parallel.tp=4"], "parallel.tp: the feed-forward width 130 does not divide by 4"),
        (QWEN3_MOE, ["parallel.tp=2", "parallel.sp=false"], "parallel.sp: experts with tp 2 need sequence parallelism"),
        (DEEPSEEK, ["parallel.tp=2", "parallel.sp=false"], "parallel.sp: latent attention with tp 2 need"),
        (QWEN3_MOE, ["model.megatron.num_moe_experts=2"], "model.megatron.num_moe_experts: cannot be set here"),
        (QWEN3_MOE, ["model.megatron.expert_model_parallel_size=2"], "cannot be set here: set parallel.ep"),
    ],
)
def test_a_layout_that_experts_do_not_fit_is_refused(project: Path, config: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, GeometryError)) as caught:
        check(project, config, *overrides)
    assert message in str(caught.value)


def test_layouts_that_experts_fit_are_let_through(project: Path) -> None:
    assert check(project, QWEN3_MOE, "parallel.tp=4", "parallel.ep=2", "parallel.etp=2").experts_per_rank == 3
    assert check(project, QWEN3_MOE, "parallel.dp=3", "parallel.ep=3").experts_per_rank == 2
    assert check(project, QWEN3_MOE, "model.megatron.moe_aux_loss_coeff=0.001").experts_per_rank == 6
    assert check(project, QWEN, "parallel.tp=2", "parallel.sp=false").experts_per_rank is None
