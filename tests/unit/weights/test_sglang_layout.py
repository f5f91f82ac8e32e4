"""SGLang's layout as pure data, against the slow oracle. tests/sglang holds both against the engine's own classes."""

from __future__ import annotations

import pytest
import torch

from megatron_rpp.errors import ConfigError, GeometryError, RppError
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.rect import check_partition
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.unit.weights.models import ALL_CONFIGS, CONFIGS, filled, model_of, random_hf, same
from tests.unit.weights.sglang_oracle import sglang_ranks

RUNNABLE = [name for name in ALL_CONFIGS if name != "qwen3_moe, some layers dense"]
SPLITS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (4, 2, 1), (8, 8, 1), (4, 4, 2), (8, 2, 4), (2, 1, 2)]  # tp, ep, attn_dp


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(("tp", "ep", "attn_dp"), SPLITS)
def test_every_rank_holds_what_the_oracle_cuts(name: str, tp: int, ep: int, attn_dp: int) -> None:
    model = model_of(name)
    ep, attn_dp = ep if model.dims.experts else 1, attn_dp if model.has_attention_dp else 1
    hf = random_hf(model, torch.bfloat16)
    layout = SGLangLayout(model, tp, torch.bfloat16, ep=ep, attn_dp=attn_dp)
    expected = sglang_ranks(ALL_CONFIGS[name], hf, tp=tp, ep=ep, attn_dp=attn_dp)
    for rank, (tensors, wanted) in enumerate(zip(filled(layout, hf), expected, strict=True)):
        assert tensors.keys() == wanted.keys(), rank
        for key, tensor in tensors.items():
            assert same(tensor, wanted[key]), (rank, key)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_the_engine_stores_every_element_of_the_model_once(name: str) -> None:
    model = model_of(name)
    check_partition(model.hf_shapes, (block for parameter in model.engine_parameters() for block in parameter.blocks))


def test_names_and_shapes_of_a_hand_written_engine() -> None:
    """Qwen3-30B-A3B's own sizes on 8 ranks with 4 expert ranks and 2-fold data-parallel attention, rank 5."""
    config = dict(
        model_type="qwen3_moe",
        num_hidden_layers=1,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
    )
    locals_ = {local.name: local for local in SGLangLayout(describe(config), 8, torch.bfloat16, ep=4, attn_dp=2).locals(5)}
    assert {name: local.shape for name, local in locals_.items()} == {
        "model.embed_tokens.weight": (37984, 2048),
        "model.layers.0.input_layernorm.weight": (2048,),
        "model.layers.0.self_attn.qkv_proj.weight": (8 * 128 + 2 * 128, 2048),
        "model.layers.0.self_attn.o_proj.weight": (2048, 1024),
        "model.layers.0.self_attn.q_norm.weight": (128,),
        "model.layers.0.self_attn.k_norm.weight": (128,),
        "model.layers.0.post_attention_layernorm.weight": (2048,),
        "model.layers.0.mlp.gate.weight": (128, 2048),
        "model.layers.0.mlp.experts.w13_weight": (32, 768, 2048),
        "model.layers.0.mlp.experts.w2_weight": (32, 2048, 384),
        "model.norm.weight": (2048,),
        "lm_head.weight": (18992, 2048),
    }
    first, second = locals_["model.layers.0.mlp.experts.w13_weight"].pieces[:2]
    assert (first.index, first.row, first.rect.span) == ((0,), 0, "model.layers.0.mlp.experts.64.gate_proj.weight[384:768, 0:2048]")
    assert (second.index, second.row, second.rect.span) == ((0,), 384, "model.layers.0.mlp.experts.64.up_proj.weight[384:768, 0:2048]")


def test_engines_lie_one_after_the_other_or_where_they_are_put() -> None:
    model = model_of("llama")
    plain = SGLangLayout(model, 2, torch.float32, engines=2)
    assert plain.ranks == 4
    assert plain.locals(0) == plain.locals(2) != plain.locals(1) == plain.locals(3)
    placed = SGLangLayout(model, 2, torch.float32, engines=2, places=(1, 0, 5, 3))
    assert placed.ranks == 6
    assert [placed.engine_rank(rank) for rank in range(6)] == [1, 0, None, 1, None, 0]
    assert placed.locals(2) == ()
    assert placed.locals(5) == plain.locals(0)


@pytest.mark.parametrize(
    ("vocab", "ranks", "rows"), [(301, 1, 320), (301, 4, 80), (301, 3, 128), (384, 3, 128), (64, 64, 1), (65, 256, 64)]
)
def test_the_vocabulary_is_padded_as_sglang_does(vocab: int, ranks: int, rows: int) -> None:
    model = describe(
        {
            **CONFIGS["llama"],
            "vocab_size": vocab,
            "num_attention_heads": ranks,
            "num_key_value_heads": ranks,
            "head_dim": 2,
            "intermediate_size": ranks,
        }
    )
    assert {local.name: local.shape[0] for local in SGLangLayout(model, ranks, torch.float32).locals(0)}["lm_head.weight"] == rows


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("llama", {"attn_dp": 2}, ConfigError, "rollout.attn_dp: SGLang's class of this model has no data-parallel attention"),
        ("mixtral", {"attn_dp": 2}, ConfigError, "no data-parallel attention"),
        ("qwen3_moe, some layers dense", {}, ConfigError, "experts in every layer, but these layers of the model are dense: 0, 2, 3"),
        ("qwen3_moe", {"ep": 3}, GeometryError, "ep and attn_dp must divide tp"),
        ("qwen3_moe", {"attn_dp": 3}, GeometryError, "ep and attn_dp must divide tp"),
        ("qwen3_moe", {"tp": 16, "ep": 16}, GeometryError, "cut a head"),
        ("qwen3_moe", {"tp": 16, "ep": 16, "attn_dp": 2}, GeometryError, "8 experts cannot be shared by 16 ranks"),
        ("llama", {"ep": 2}, GeometryError, "0 experts"),
        ("llama", {"engines": 2, "places": (0, 1, 2, 3)}, GeometryError, "2 x 4 different ranks"),
        ("llama", {"places": (0, 1, 2, 2)}, GeometryError, "1 x 4 different ranks"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(name: str, change: dict[str, int], error: type[RppError], message: str) -> None:
    with pytest.raises(error, match=message):
        SGLangLayout(model_of(name), **{"tp": 4, "dtype": torch.float32, **change})


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe, shared expert", "mixtral"])
def test_a_tied_head_is_refused_where_sglang_would_fill_one_of_its_own_at_random(name: str) -> None:
    model = describe(ALL_CONFIGS[name] | {"tie_word_embeddings": True})
    with pytest.raises(ConfigError, match="does not tie the head to the embedding"):
        SGLangLayout(model, tp=1, dtype=torch.float32)
