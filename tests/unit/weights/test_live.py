"""Binding live parameters, as a list of (name in its chunk, real layer, tensor), to what the layout expects."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_rpp.errors import ConfigError, GeometryError, RppError
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.live import Named, bind, vocab_rows
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
