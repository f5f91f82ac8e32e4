"""An engine of two workers. Slow on a CPU, where every layer costs two gloo collectives, so it does little and once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout.engine import UPDATE_S, Engine
from megatron_rpp.rollout.memory import Outbox
from tests.sglang import tiny


def publish_shards(engine: Engine, model: nn.Module, version: int) -> None:
    """Every rank its own shards, from a memory of its own, as trainers hand them over."""
    ranks = [tiny.shards(model, rank, 2) for rank in range(2)]
    outboxes = [Outbox(), Outbox()]
    with engine.update_shards(version, [tiny.announce(parameters, 2) for parameters in ranks]) as load:
        load(
            [
                box.pack([part for name in parameters for part in tiny.rectangles(name, parameters[name])])
                for box, parameters in zip(outboxes, ranks, strict=True)
            ]
        )
    for box in outboxes:
        box.close()


@pytest.mark.slow
def test_two_workers_are_one_model_before_and_after_an_update(start_engine: Callable[..., Engine], model: nn.Module) -> None:
    """With the prefix cache, as on a GPU: what was cached must not outlive the update."""
    engine = start_engine(tp=2, sglang={"disable_radix_cache": False, "enable_deterministic_inference": False})
    assert not engine.info.is_seeded
    assert sorted(report["rank"] for report in engine.info.reports if report["role"] == "scheduler") == ["tp0-pp0", "tp1-pp0"]
    asked = tiny.requests(4, max_tokens=5)

    def worst_gap() -> float:
        done = tiny.sample(engine, asked)
        expected = [logp for each in asked for logp in tiny.logp_of(model, each.tokens, done[each.key].tokens)]
        return max(abs(a - b) for a, b in zip([logp for each in asked for logp in done[each.key].logp], expected, strict=True))

    assert worst_gap() < 5e-6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    try:
        tiny.publish(engine, tiny.state(model), 1)
        assert worst_gap() < 5e-6
    finally:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(0.9)
    publish_shards(engine, model, 2)
    assert worst_gap() < 5e-6
    engine._call("begin", UPDATE_S)
    with pytest.raises(EngineError, match=r"rank 0: ValueError: unknown tensor x; rank 1: ValueError: unknown tensor x"):
        engine._call("load", UPDATE_S, buckets=[engine._outbox.pack([("x", torch.zeros(1))])])
    engine.close()
    assert not engine._process.members()
