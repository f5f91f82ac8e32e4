"""Weights that reach the engine already cut, under SGLang's own names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout.engine import Engine
from tests.sglang import tiny


def _other(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9).add_(torch.randn_like(parameter) * 0.01)
    return other


def _publish(engine: Engine, parameters: dict[str, Tensor], version: int, num_buckets: int) -> None:
    parts = [part for name, tensor in parameters.items() for part in tiny.rectangles(name, tensor)]
    with engine.update_shards(version, [tiny.announce(parameters, 1)]) as load:
        for bucket in range(num_buckets):
            load([engine._outbox.pack(parts[bucket::num_buckets])])


@pytest.mark.parametrize("num_buckets", [1, 7])
def test_shards_leave_the_same_bits_as_whole_tensors(engine: Engine, model: nn.Module, num_buckets: int) -> None:
    """From NaN, so that a rectangle that lands nowhere shows in the checksum."""
    new = _other(model)
    tiny.publish(engine, tiny.state(new), 1)
    expected = engine.checksum()
    tiny.publish(engine, [(name, torch.full_like(tensor, float("nan"))) for name, tensor in tiny.state(model)], 2)
    _publish(engine, tiny.shards(new, 0, 1), 3, num_buckets)
    assert engine.checksum() == expected
    assert {done.version for done in tiny.sample(engine, tiny.requests(3)).values()} == {3}


def test_swapped_key_and_value_change_that_parameter_alone(engine: Engine, model: nn.Module) -> None:
    before = engine.checksum()[0]
    parameters = tiny.shards(model, 0, 1)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    query, key, value = parameters[name].split([64, 32, 32])
    parameters[name] = torch.cat([query, value, key])
    _publish(engine, parameters, 1, 1)
    after = engine.checksum()[0]
    assert {each for each in before if before[each] != after[each]} == {name}


def test_shards_for_another_number_of_ranks_are_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="expected: 1 ranks"), engine.update_shards(1, [{}, {}]):
        pass
