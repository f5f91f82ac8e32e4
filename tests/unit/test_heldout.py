"""Under which name an evaluation keeps its answers: those of another way of sampling must not be taken for its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_rpp.heldout import evaluate
from megatron_rpp.rollout.request import Sampling


def test_another_temperature_or_budget_is_another_evaluation() -> None:
    names: list[str] = []

    def collect(prompts: Any, *, name: str, **_: Any) -> tuple[()]:
        names.append(name)
        return ()

    collector = SimpleNamespace(collect=collect, groups=SimpleNamespace(rank=1))
    ways = [Sampling(max_tokens=8), Sampling(max_tokens=8, temperature=0.0), Sampling(max_tokens=9), Sampling(max_tokens=8)]
    for sampling in ways:
        evaluate(collector, (), version=3, sampling=sampling)
    assert names[0] == names[3]
    assert len(set(names)) == 3
    assert all(name.startswith("eval-000003.") for name in names)  # resume.drop_later finds them so
