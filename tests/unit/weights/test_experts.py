"""Mixtures of experts and latent attention on Megatron's side: who holds which expert, against the slow oracle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import HFLayout, MegatronLayout
from megatron_rpp.weights.rect import check_partition
from tests.unit.weights.models import DEEPSEEK, MOE_CONFIGS, QWEN_MOE, filled, model_of, random_hf, same
from tests.unit.weights.oracle import megatron_ranks

STAGES = {1: [[0, 1, 2, 3]], 2: [[0, 2], [1, 3]]}  # interleaved: two stages of two chunks


@pytest.mark.parametrize("name", MOE_CONFIGS)
@pytest.mark.parametrize(
    ("tp", "replicas", "ep", "etp"), [(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 4, 1), (2, 2, 2, 2), (1, 4, 2, 1), (4, 1, 1, 4), (1, 4, 1, 2)]
)
def test_every_rank_holds_what_the_oracle_cuts_with_reshapes(name: str, tp: int, replicas: int, ep: int, etp: int) -> None:
    model = model_of(name)
    hf = random_hf(model)
    for pp, stages in STAGES.items():
        layout = MegatronLayout.even(model, tp=tp, pp=pp, vpp=pp, replicas=replicas, ep=ep, etp=etp, dtype=torch.float32)
        expected = megatron_ranks(MOE_CONFIGS[name], hf, stages, tp=tp, replicas=replicas, ep=ep, etp=etp)
        for rank, (tensors, wanted) in enumerate(zip(filled(layout, hf), expected, strict=True)):
            assert tensors.keys() == wanted.keys(), rank
            for key, tensor in tensors.items():
                assert same(tensor, wanted[key]), (rank, key)


@pytest.mark.parametrize("name", MOE_CONFIGS)
@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (8, 1), (2, 2), (4, 2), (1, 8)])
def test_the_experts_of_all_ranks_partition_every_hf_tensor(name: str, ep: int, etp: int) -> None:
    """Eight ranks a stage; copies of one expert are counted once, and so is what every rank holds."""
    model = model_of(name)
    layout = MegatronLayout.even(model, tp=2, pp=2, replicas=4, ep=ep, etp=etp, dtype=torch.float32)
    shared = {parameter.name for parameter in model.parameters() if parameter.split == "none"}
    rects, seen = [], set()
    for local in (local for rank in range(layout.ranks) for local in layout.locals(rank)):
        key = local.name if local.name in shared else (local.name, local.pieces)
        rects += [] if key in seen else [piece.rect for piece in local.pieces]
        seen.add(key)
    check_partition(model.hf_shapes, rects)


def test_hf_names_and_shapes_of_a_hand_written_deepseek() -> None:
    """The second layer of one with 2 experts of width 3, 2 shared ones, and 4 heads of 6 + 2 for scores and 5 for values."""
    sizes = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=40, num_attention_heads=4, num_key_value_heads=4, vocab_size=100)
    sizes |= dict(moe_intermediate_size=3, n_routed_experts=2, n_shared_experts=2, first_k_dense_replace=1)
    sizes |= dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5)
    shapes = describe({"model_type": "deepseek_v3", **sizes}).hf_shapes
    expected = {
        "input_layernorm.weight": (16,),
        "self_attn.q_a_proj.weight": (12, 16),
        "self_attn.q_a_layernorm.weight": (12,),
        "self_attn.q_b_proj.weight": (32, 12),
        "self_attn.kv_a_proj_with_mqa.weight": (12, 16),
        "self_attn.kv_a_layernorm.weight": (10,),
        "self_attn.kv_b_proj.weight": (44, 10),
        "self_attn.o_proj.weight": (16, 20),
        "post_attention_layernorm.weight": (16,),
        "mlp.gate.weight": (2, 16),
        "mlp.gate.e_score_correction_bias": (2,),
        "mlp.shared_experts.gate_proj.weight": (6, 16),
        "mlp.shared_experts.up_proj.weight": (6, 16),
        "mlp.shared_experts.down_proj.weight": (16, 6),
    }
    for expert in (0, 1):
        expected |= {f"mlp.experts.{expert}.{part}_proj.weight": (3, 16) for part in ("gate", "up")}
        expected |= {f"mlp.experts.{expert}.down_proj.weight": (16, 3)}
    prefix = "model.layers.1."
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)} == expected
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (16, 40)


def test_the_router_bias_keeps_float32_on_every_side() -> None:
    model = model_of("deepseek_v3, router bias")
    layout = MegatronLayout.even(model, dtype=torch.bfloat16)
    dtypes = {local.name: local.dtype for local in layout.locals(0)}
    assert dtypes["decoder.layers.2.mlp.router.expert_bias"] == torch.float32
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    whole = {local.name: local.dtype for local in HFLayout.of(model, dtype=torch.bfloat16, ranks=1, holders=(0,)).locals(0)}
    assert [name for name, dtype in whole.items() if dtype == torch.float32] == [
        f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2, 3)
    ]


def test_layers_that_predict_further_tokens_are_known_and_not_read() -> None:
    model = model_of("deepseek_v3, router bias")
    assert not any(name.startswith("model.layers.4.") for name in model.hf_shapes)
    for name in ("eh_proj.weight", "shared_head.head.weight", "self_attn.kv_b_proj.weight", "mlp.experts.7.up_proj.weight"):
        assert f"model.layers.4.{name}" in model.ignored
    assert not any(name.endswith(model.ignored) for name in model.hf_shapes)


@pytest.mark.parametrize(
    ("listed", "step", "dense"), [([], 1, []), ([0], 1, [0]), ([], 2, [0, 2]), ([3], 2, [0, 2, 3]), ([], 3, [0, 1, 3])]
)
def test_which_layers_have_experts(listed: list[int], step: int, dense: list[int]) -> None:
    model = describe({"model_type": "qwen3_moe", **QWEN_MOE, "mlp_only_layers": listed, "decoder_sparse_step": step})
    assert [n for n in range(4) if f"model.layers.{n}.mlp.gate_proj.weight" in model.hf_shapes] == dense
    assert [n for n in range(4) if f"model.layers.{n}.mlp.gate.weight" not in model.hf_shapes] == dense


def test_deepseek_layers_without_experts_come_first_and_by_frequency() -> None:
    model = describe({"model_type": "deepseek_v2", **DEEPSEEK, "first_k_dense_replace": 1, "moe_layer_freq": 3})
    assert [n for n in range(4) if f"model.layers.{n}.mlp.gate.weight" in model.hf_shapes] == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ep": 3}, "8 experts cannot be shared by 3 ranks"),
        ({"ep": 4}, "do not make equal expert groups\n  got: 2 ranks for ep 4 x etp 1"),
        ({"ep": 2, "etp": 2}, "2 ranks for ep 2 x etp 2"),
    ],
)
def test_a_split_of_the_experts_that_does_not_divide_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        MegatronLayout.even(model_of("qwen3_moe"), tp=2, dtype=torch.float32, **change)


def test_an_expert_that_etp_cannot_cut_is_named() -> None:
    model = describe({"model_type": "qwen3_moe", **QWEN_MOE, "moe_intermediate_size": 15})
    with pytest.raises(GeometryError, match=r"layers\.0\.mlp\.experts\.linear_fc1\.weight0: 15 rows or columns cannot be cut in 2"):
        MegatronLayout.even(model, tp=2, etp=2, dtype=torch.float32).locals(0)


def test_a_dense_model_has_no_experts_to_share() -> None:
    with pytest.raises(GeometryError, match="0 experts cannot be shared by 2 ranks"):
        MegatronLayout.even(model_of("llama"), tp=2, ep=2, dtype=torch.float32)


@pytest.mark.parametrize("change", [{"num_experts": None}, {"moe_intermediate_size": 0}, {"num_experts": "8"}])
def test_sizes_of_experts_must_be_there(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: not a size"):
        describe({"model_type": "qwen3_moe", **QWEN_MOE, **change})


def test_two_layouts_of_one_model_have_one_hash_however_they_were_made() -> None:
    names = itertools.repeat("deepseek_v3, router bias", 2)
    one, other = (MegatronLayout.even(model_of(name), tp=2, ep=2, dtype=torch.float32) for name in names)
    one.locals(0)
    assert one == other
    assert hash(one) == hash(other)
    assert one != MegatronLayout.even(one.model, tp=2, etp=2, dtype=torch.float32)
