"""Rules between a model and the layouts: of the engine, and of the reference and the critic, which are models too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.load import load
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError
from tests.unit.config.conftest import QWEN

DENSE = {**QWEN, "tie_word_embeddings": False}
MOE = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36,
}  # fmt: skip
MIXTRAL = {**DENSE, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
ENGINE_OF_4 = ("parallel.dp=4", "rollout.tp=4")


def check(project: Path, config: dict[str, Any], *overrides: str, for_sft: bool = False, for_eval: bool = False) -> str:
    """What is wrong; empty if nothing is."""
    (project.parent / "model/config.json").write_text(json.dumps(config))
    try:
        validate(load(project, overrides), for_sft=for_sft, for_eval=for_eval)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (MOE | {"tie_word_embeddings": True}, (), "rollout: SGLang cannot run this model: its class for qwen3_moe does not tie the head"),
        (MIXTRAL | {"tie_word_embeddings": True}, (), "rollout: SGLang cannot run this model: its class for mixtral does not tie"),
        (MOE | {"mlp_only_layers": [1, 3]}, (), "but these layers of the model are dense: 1, 3"),
        (MOE, (*ENGINE_OF_4, "rollout.sglang.ep_size=3"), "rollout.sglang.ep_size: must divide rollout.tp 4, got 3"),
        (MOE, (*ENGINE_OF_4, "rollout.sglang.ep_size=4"), "rollout.sglang.ep_size: the 6 experts do not divide by 4"),
        (MOE | {"moe_intermediate_size": 34}, ENGINE_OF_4, "rollout.tp: the width of an expert, 34, does not divide by 4"),
        (DENSE, ("parallel.dp=8", "rollout.tp=8"), "rollout.tp: the 4 attention heads do not divide by 8"),
        (DENSE | {"intermediate_size": 126}, ENGINE_OF_4, "rollout.tp: the feed-forward width 126 does not divide by 4"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_before_it_starts(
    project: Path, config: dict[str, Any], overrides: tuple[str, ...], message: str
) -> None:
    assert message in check(project, config, *overrides)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (MOE, (*ENGINE_OF_4, "rollout.sglang.ep_size=2")),
        (DENSE, ENGINE_OF_4),
    ],
)
def test_an_engine_that_fits_is_let_through(project: Path, config: dict[str, Any], overrides: tuple[str, ...]) -> None:
    assert check(project, config, *overrides) == ""


def test_sft_starts_no_engine_and_takes_models_that_only_an_engine_refuses(project: Path) -> None:
    (project.parent / "rows.jsonl").write_text("")
    sft = [f"sft.train={project.parent / 'rows.jsonl'}", "sft.out=out", "sft.steps=1", "sft.warmup_steps=0"]
    config = MOE | {"tie_word_embeddings": True}
    assert check(project, config, *sft, for_sft=True) == ""
    assert "rollout: SGLang cannot run this model" in check(project, config, *sft)


@pytest.mark.parametrize("config", [DENSE | {"quantization_config": {"quant_method": "fp8"}}, DENSE | {"compression_config": {"a": 1}}])
def test_an_evaluation_takes_quantized_weights_which_only_the_engine_reads(project: Path, config: dict[str, Any]) -> None:
    assert check(project, config, f"data.eval={project.parent / 'train.jsonl'}", for_eval=True) == ""
    assert "this setting is not supported" in check(project, config)
    other = config | {"use_sliding_window": True}
    assert "use_sliding_window" in check(project, other, f"data.eval={project.parent / 'train.jsonl'}", for_eval=True)


REFERENCE = ("algo.kl_loss_coef=0.1",)
CRITIC = ("algo.estimator=gae",)


@pytest.mark.parametrize(("name", "overrides"), [("model.ref", REFERENCE), ("critic.hf", CRITIC)])
def test_the_reference_and_the_critic_are_checked_as_the_policy_is(project: Path, name: str, overrides: tuple[str, ...]) -> None:
    other = project.parent / "other"
    other.mkdir()
    given = (*overrides, f"{name}={other}")
    (other / "config.json").write_text(json.dumps(DENSE))
    assert check(project, DENSE, *given) == ""
    (other / "config.json").write_text(json.dumps(DENSE | {"use_sliding_window": True}))
    assert f"{name}: {other}/config.json: use_sliding_window: this setting is not supported" in check(project, DENSE, *given)
    (other / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": 3}))
    assert f"parallel.pp: {name}: the 3 layers do not divide into pp 2" in check(project, DENSE, *given, "parallel.pp=2")
