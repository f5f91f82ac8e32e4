from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.weights.families import blocks, llama
from megatron_rpp.weights.families.dims import Dims
from megatron_rpp.weights.families.parameter import Model, Parameter
from megatron_rpp.weights.families.registry import FAMILIES, describe, register
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.rect import check_partition
from tests.unit.weights.models import CONFIGS, SIZES, filled, model_of, random_hf, same
from tests.unit.weights.oracle import megatron_shard


def test_hf_names_and_shapes_of_a_hand_written_qwen2() -> None:
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert describe(config).hf_shapes == {
        "model.embed_tokens.weight": (100, 16),
        f"{attention}q_proj.weight": (16, 16),
        f"{attention}k_proj.weight": (8, 16),
        f"{attention}v_proj.weight": (8, 16),
        f"{attention}o_proj.weight": (16, 16),
        f"{attention}q_proj.bias": (16,),
        f"{attention}k_proj.bias": (8,),
        f"{attention}v_proj.bias": (8,),
        f"{mlp}gate_proj.weight": (40, 16),
        f"{mlp}up_proj.weight": (40, 16),
        f"{mlp}down_proj.weight": (16, 40),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.post_attention_layernorm.weight": (16,),
        "model.norm.weight": (16,),
        "lm_head.weight": (100, 16),
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_holds_what_the_oracle_cuts_with_reshapes(name: str, tp: int) -> None:
    model = model_of(name)
    hf = random_hf(model)
    layout = MegatronLayout.even(model, tp=tp, pp=2, vpp=2, dtype=torch.float32)
    for rank, tensors in enumerate(filled(layout, hf)):
        # Two stages of two chunks: stage 0 holds layers 0 1 4 5, stage 1 the others.
        layers, ends = ([0, 1, 4, 5], "first") if rank < tp else ([2, 3, 6, 7], "last")
        expected = megatron_shard(CONFIGS[name], hf, tp, rank % tp, layers, ends)
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert same(tensor, expected[key]), key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_the_rectangles_of_all_ranks_partition_every_hf_tensor(name: str, tp: int, pp: int) -> None:
    """tp 8 is more than the KV heads: Megatron then cuts inside a KV group. Whole copies (norms, tied head) are counted once."""
    model = model_of(name)
    layout = MegatronLayout.even(model, tp=tp, pp=pp, dtype=torch.float32)
    whole = {parameter.name for parameter in model.parameters() if parameter.split == "none"}
    rects = []
    for rank in range(layout.ranks):
        for local in layout.locals(rank):
            is_copy = (local.name in whole and rank % tp > 0) or (model.dims.is_tied and local.name == "output_layer.weight")
            rects += [] if is_copy else [piece.rect for piece in local.pieces]
    check_partition(model.hf_shapes, rects)


def test_a_tied_head_lives_twice_in_a_pipeline_and_once_without() -> None:
    model = model_of("llama, tied")
    alone = MegatronLayout.even(model, tp=1, dtype=torch.float32)
    assert "output_layer.weight" not in {local.name for local in alone.locals(0)}
    piped = MegatronLayout.even(model, tp=1, pp=2, dtype=torch.float32)
    (head,) = [local for local in piped.locals(1) if local.name == "output_layer.weight"]
    assert [piece.rect.hf for piece in head.pieces] == ["model.embed_tokens.weight"]
    assert "lm_head.weight" not in model.hf_shapes


def test_an_unknown_model_type_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model_type\n  expected: \['deepseek_v2', .*'qwen3_moe'\]\n  got: gpt2"):
        describe({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match="unknown model_type"):
        describe({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size: not a size"),
        ({"vocab_size": "301"}, "vocab_size: not a size"),
        ({"num_hidden_layers": True}, "num_hidden_layers: not a size"),
        ({"intermediate_size": 0}, "intermediate_size: not a size"),
        ({"attention_bias": True}, "attention_bias: not supported"),
        ({"mlp_bias": True}, "mlp_bias: not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ],
)
def test_a_config_that_the_family_cannot_describe_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe({**CONFIGS["llama"], **change})


def test_heads_that_do_not_share_the_kv_heads_are_refused() -> None:
    with pytest.raises(GeometryError, match="8 heads cannot share 3 KV heads"):
        describe({**CONFIGS["llama"], "num_key_value_heads": 3})


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.usefixtures("clean_registry")
def test_a_family_can_be_registered_from_outside_the_package() -> None:
    """A made-up model: Llama with one more norm after attention and a bias on the attention output."""

    def layer(dims: Dims, n: int) -> tuple[Parameter, ...]:
        te, hf = f"decoder.layers.{n}", f"model.layers.{n}"
        extra = (
            blocks.whole(f"{te}.post_self_attn_layernorm.weight", f"{hf}.post_self_attn_layernorm.weight", dims.hidden),
            blocks.whole(f"{te}.self_attention.linear_proj.bias", f"{hf}.self_attn.o_proj.bias", dims.hidden),
        )
        return (*llama.layer(dims, n), *extra)

    def sandwich(config: Mapping[str, Any]) -> Model:
        return llama.decoder(Dims.from_hf(config), layer)

    register("sandwich", sandwich)
    model = describe({"model_type": "sandwich", **SIZES})
    assert model.hf_shapes["model.layers.7.self_attn.o_proj.bias"] == (24,)
    assert len(model.hf_shapes) == len(model_of("llama").hf_shapes) + 2 * 8
    layout = MegatronLayout.even(model, tp=2, dtype=torch.float32)
    assert "decoder.layers.3.post_self_attn_layernorm.weight" in {local.name for local in layout.locals(1)}
    register("sandwich", sandwich)  # twice the same is no conflict
    with pytest.raises(ConfigError, match="sandwich: model_type already has a family"):
        register("sandwich", llama.describe)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_takes_at_most_sixty_lines(family: Callable[[Mapping[str, Any]], Model]) -> None:
    assert len(inspect.getsource(inspect.getmodule(family)).splitlines()) <= 60


def test_the_registry_knows_each_family_module() -> None:
    folder = Path(inspect.getfile(blocks)).parent
    modules = {file.stem for file in folder.glob("*.py")} - {"__init__", "blocks", "dims", "parameter", "registry"}
    assert modules == set(FAMILIES)
    assert all(FAMILIES[name].__module__.rpartition(".")[2] == name for name in modules)
