"""Binding live parameters, as a list of (name in its chunk, real layer, tensor), to what the layout expects."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_rpp.errors import ConfigError, GeometryError, RppError
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.live import Named, bind, expert_split, global_name, vocab_rows
from tests.unit.weights.models import model_of

LAYOUT = MegatronLayout.even(model_of("qwen2, biases"), tp=2, pp=2, vpp=2, dtype=torch.float32)
RANK = 3  # last stage: layers 2 3 in its first chunk, 6 7 in its second


def live_parameters() -> list[Named]:
    """As two chunks of a real model name them: layer numbers of a chunk start at 0 again."""
    found: list[Named] = []
    for local in LAYOUT.locals(RANK):
        layer = int(local.name.split(".")[2]) if ".layers." in local.name else None
        name = local.name if layer is None else re.sub(r"layers\.\d+", f"layers.{layer % 4 - 2}", local.name)
        found.append((name, layer, torch.zeros(local.shape)))
    return found


def test_chunk_names_are_bound_by_their_real_layer_whatever_their_order() -> None:
    live = live_parameters()
    bound = bind(LAYOUT.locals(RANK), reversed(live))
    assert list(bound) == [local.name for local in LAYOUT.locals(RANK)]
    by_pointer = {tensor.data_ptr(): (name, layer) for name, layer, tensor in live}
    name, layer = by_pointer[bound["decoder.layers.6.mlp.linear_fc1.weight"].data_ptr()]
    assert (name, layer) == ("decoder.layers.0.mlp.linear_fc1.weight", 6)


def test_a_bound_parameter_is_the_live_one_even_after_its_memory_has_moved() -> None:
    norm = torch.nn.Parameter(torch.zeros(24))
    bound = bind(LAYOUT.locals(RANK), replaced(NORM, tensor=norm))[NORM]
    norm.data = torch.full((24,), 7.0)
    assert bound.tolist() == [7] * 24


def replaced(which: str, **change: object) -> list[Named]:
    """The live parameters with one of them changed."""
    found = []
    for key, layer, tensor in live_parameters():
        if key == which:
            key, layer, tensor = change.get("name", key), change.get("layer", layer), change.get("tensor", tensor)
        found.append((key, layer, tensor))
    return found


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("live", "error", "message"),
    [
        (
            replaced(NORM, name="decoder.final_norm.weight"),
            ConfigError,
            r"described: \['decoder.final_norm.weight'\].*\['decoder.final_lay",
        ),
        (live_parameters()[1:], ConfigError, "described but not live: .*decoder.layers.2"),
        ([*live_parameters(), (NORM, None, torch.zeros(24))], ConfigError, "two live parameters are the same one"),
        (replaced(NORM, tensor=torch.zeros(23)), GeometryError, r"final_layernorm.weight: wrong shape\n  expected: \(24,\)"),
        (replaced(NORM, tensor=torch.zeros(24).half()), GeometryError, "final_layernorm.weight: wrong dtype"),
        (replaced(NORM, layer=3), ConfigError, "layer number and name disagree"),
        (replaced("decoder.layers.0.mlp.linear_fc2.weight", layer=None), ConfigError, "layer number and name disagree"),
        (replaced("decoder.layers.0.mlp.linear_fc2.weight", layer=5), ConfigError, "decoder.layers.5.mlp.linear_fc2.weight"),
    ],
)
def test_live_parameters_that_do_not_fit_are_named(live: list[Named], error: type[RppError], message: str) -> None:
    with pytest.raises(error, match=message):
        bind(LAYOUT.locals(RANK), live)


def test_the_height_of_the_vocabulary_shard_comes_from_whichever_end_the_stage_has() -> None:
    assert vocab_rows(live_parameters()) == 256
    assert vocab_rows([("embedding.word_embeddings.weight", None, torch.zeros(192, 24))]) == 192
    assert vocab_rows([(NORM, None, torch.zeros(24))]) is None


EXPERTS = MegatronLayout.even(model_of("deepseek_v3, router bias"), tp=2, pp=2, replicas=2, ep=2, etp=2, dtype=torch.bfloat16)


def live_experts(rank: int, *, is_local_spec: bool) -> list[Named]:
    """As a rank's modules name them: experts from 0, and in the torch spec norms and experts as modules of their own."""
    own = {"linear_q_up_proj.layer_norm_weight": "q_layernorm.weight", "linear_kv_up_proj.layer_norm_weight": "kv_layernorm.weight"}
    own["mlp.linear_fc1.layer_norm_weight"] = "pre_mlp_layernorm.weight"
    found: list[Named] = []
    for local in EXPERTS.locals(rank):
        layer = int(local.name.split(".")[2]) if ".layers." in local.name else None
        name = local.name if layer is None else re.sub(r"layers\.\d+", f"layers.{layer % 2}", local.name)
        if expert := re.search(r"experts\.(linear_fc\d\.weight)(\d+)$", name):
            number = int(expert[2]) % 4
            tail = f"local_experts.{number}.{expert[1]}" if is_local_spec else f"{expert[1]}{number}"
            name = name[: expert.start()] + "experts." + tail
        for fused, module in own.items() if is_local_spec else ():
            name = name.replace(fused, module)
        found.append((name, layer, torch.zeros(local.shape, dtype=local.dtype)))
    return found


@pytest.mark.parametrize("is_local_spec", [False, True])
@pytest.mark.parametrize(("rank", "first"), [(1, 0), (2, 4), (7, 4)])
def test_experts_are_bound_by_their_number_in_the_model_under_either_spec(rank: int, first: int, is_local_spec: bool) -> None:
    live = live_experts(rank, is_local_spec=is_local_spec)
    assert expert_split(EXPERTS.model, live) == (2, 2)
    bound = bind(EXPERTS.locals(rank), live, first_expert=first)
    assert list(bound) == [local.name for local in EXPERTS.locals(rank)]
    by_pointer = {tensor.data_ptr(): name for name, _, tensor in live}
    layer = 1 if rank < 4 else 2
    name = by_pointer[bound[f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight{first + 3}"].data_ptr()]
    tail = "local_experts.3.linear_fc2.weight" if is_local_spec else "linear_fc2.weight3"
    assert name == f"decoder.layers.{layer % 2}.mlp.experts.{tail}"


def test_experts_of_another_rank_are_not_this_ranks() -> None:
    with pytest.raises(ConfigError, match=r"described but not live: .*experts.linear_fc1.weight4"):
        bind(EXPERTS.locals(2), live_experts(2, is_local_spec=False), first_expert=0)


def test_a_stage_without_experts_says_nothing_about_their_share() -> None:
    assert expert_split(model_of("llama"), live_parameters()) == (None, None)


def test_a_lost_expert_is_an_error() -> None:
    live = [one for one in live_experts(1, is_local_spec=False) if not one[0].endswith("linear_fc1.weight2")]
    with pytest.raises(GeometryError, match=r"live experts are no equal share\n  expected: of 8"):
        expert_split(EXPERTS.model, live)


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc1.weight3", 4, "decoder.layers.9.mlp.experts.linear_fc1.weight7"),
        ("decoder.layers.0.mlp.experts.local_experts.11.linear_fc2.weight", 16, "decoder.layers.9.mlp.experts.linear_fc2.weight27"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", 4, "decoder.layers.9.mlp.shared_experts.linear_fc1.weight"),
        ("decoder.layers.0.mlp.experts.weight1", 4, "decoder.layers.9.mlp.experts.weight1"),
    ],
)
def test_global_names(name: str, first: int, expected: str) -> None:
    assert global_name(name, 9, first) == expected
