"""Loss and gradients of a small model on packed sequences are those of one process on every layout, to six digits."""

from __future__ import annotations

import re

import pytest
import torch

from tests.dist.ranks import run_ranks
from tests.patches.tiny import Layout, losses_and_gradients

EVEN = ((8, 12, 4), (8, 8, 4))  # multiples of 2 * CP
QWEN = {"qk_layernorm": True, "add_qkv_bias": True}
GPT = {"normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_grouped_gemm": True, "moe_ffn_hidden_size": 16}
MOE["moe_router_load_balancing_type"] = "none"
MLA = {"multi_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
MLA |= {"rope_type": "rope", "rotary_scaling_factor": 1.0, "qk_layernorm": True, "num_query_groups": 4}

ONE = {
    "llama": Layout(),
    "llama even": Layout(lengths=EVEN),
    "qwen": Layout(options=QWEN),
    "gpt": Layout(options=GPT),
    "moe": Layout(options=MOE),
    "mla": Layout(options=MLA),
}
# Four ranks each; what a layout leaves over is data parallel, over copies of the same batch.
MANY = {
    "llama dp4": Layout(),
    "llama tp2": Layout(tp=2),
    "llama pp2": Layout(pp=2),
    "llama tp2 pp2": Layout(tp=2, pp=2),
    "llama even cp2": Layout(cp=2, lengths=EVEN),
    "llama even tp2 cp2": Layout(tp=2, cp=2, lengths=EVEN),
    "qwen tp2 pp2": Layout(tp=2, pp=2, options=QWEN),
    "gpt tp2 pp2": Layout(tp=2, pp=2, options=GPT),
    "moe pp2 ep2": Layout(pp=2, ep=2, options=MOE),
    "moe tp2 ep2": Layout(tp=2, ep=2, options=MOE),
    "mla tp2 pp2": Layout(tp=2, pp=2, options=MLA),
}

Result = tuple[float, float, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def one() -> dict[str, Result]:
    return dict(zip(ONE, run_ranks(1, losses_and_gradients, list(ONE.values()), timeout_s=120)[0], strict=True))


@pytest.fixture(scope="module")
def many() -> dict[str, Result]:
    return dict(zip(MANY, run_ranks(4, losses_and_gradients, list(MANY.values()), timeout_s=240)[0], strict=True))


@pytest.mark.parametrize("name", MANY)
def test_the_layout_changes_nothing(one: dict[str, Result], many: dict[str, Result], name: str) -> None:
    reference = next(reference for reference in sorted(ONE, key=len, reverse=True) if name.startswith(reference))
    (loss, norm, grads), (expected_loss, expected_norm, expected) = many[name], one[reference]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert norm == pytest.approx(expected_norm, rel=1e-5), "some parameter is left out of the norm, or counted twice"
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        assert float(grad.norm()) > 0, f"{key} has no gradient to compare"
        assert float((grads[key] - grad).norm()) <= 1e-5 * float(grad.norm()), key


@pytest.mark.parametrize("name", ONE)
def test_the_norm_that_clips_is_the_norm_of_all_gradients(one: dict[str, Result], name: str) -> None:
    _, norm, grads = one[name]
    assert norm == pytest.approx(float(torch.stack([grad.double().norm() for grad in grads.values()]).norm()), rel=1e-5)


def test_pipeline_stages_give_the_same_bits_as_one_process(one: dict[str, Result], many: dict[str, Result]) -> None:
    (loss, _, grads), (expected_loss, _, expected) = many["llama pp2"], one["llama"]
    assert loss == expected_loss
    for key, grad in expected.items():
        assert torch.equal(grads[key], grad), key


def test_parameters_have_the_names_of_transformer_engine(one: dict[str, Result]) -> None:
    """As extensions/transformer_engine.py and its layer spec give them on a GPU."""
    layer = re.compile(r"decoder\.layers\.0\.")
    names = {family: {layer.sub("", key) for key in one[family][2] if layer.match(key)} for family in ("qwen", "gpt", "moe", "mla")}
    dense = {"linear_proj.weight", "linear_qkv.weight", "linear_qkv.layer_norm_weight"}
    mlp = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    norms = {"linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight"}
    assert names["qwen"] == {f"self_attention.{name}" for name in dense | norms} | mlp
    biases = {"self_attention.linear_qkv.layer_norm_bias", "mlp.linear_fc1.layer_norm_bias"}
    assert names["gpt"] == {f"self_attention.{name}" for name in dense} | mlp | biases
    experts = {f"mlp.experts.linear_fc{layer}.weight{expert}" for layer in (1, 2) for expert in range(4)}
    assert names["moe"] == {f"self_attention.{name}" for name in dense} | {"pre_mlp_layernorm.weight", "mlp.router.weight"} | experts
    latent = {"linear_q_down_proj.weight", "linear_q_up_proj.layer_norm_weight", "linear_q_up_proj.weight", "linear_proj.weight"}
    latent |= {"linear_kv_down_proj.weight", "linear_kv_up_proj.layer_norm_weight", "linear_kv_up_proj.weight"}
    assert names["mla"] == {f"self_attention.{name}" for name in latent} | mlp | {"input_layernorm.weight"}
