"""What the builder of the Megatron model refuses, `rpp check` refuses in the same words, without starting a rank."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.__main__ import main
from megatron_rpp.config.load import load
from megatron_rpp.errors import RppError
from tests.dist.ranks import run_ranks
from tests.mcore import tiny
from tests.unit.hf.configs import raw_of

QWEN2, QWEN3, LLAMA, MIXTRAL = "qwen2, biases", "qwen3, norms and wide heads", "llama", "mixtral"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LAYERS = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
VISION = {"vision_config": {"depth": 2}, "text_config": {"model_type": "qwen2_5_vl_text"}}
Case = tuple[str, dict[str, Any], tuple[str, ...], str]
# name -> (the config.json of a variant, what differs in it, settings, what the message names)
CASES: dict[str, Case] = {
    "mistral": (LLAMA, {"model_type": "mistral"}, (), "config.json: model_type: this model family is not supported"),
    "gemma2": (LLAMA, {"model_type": "gemma2"}, (), "got: gemma2"),
    "phi3": (LLAMA, {"model_type": "phi3"}, (), "got: phi3"),
    "glm4": (LLAMA, {"model_type": "glm4"}, (), "got: glm4"),
    "gpt-oss": (MIXTRAL, {"model_type": "gpt_oss"}, (), "got: gpt_oss"),
    "qwen3-next": ("qwen3_moe", {"model_type": "qwen3_next"}, (), "got: qwen3_next"),
    "vision": (QWEN2, {"model_type": "qwen2_5_vl", **VISION}, (), "choose a text-only model"),
    "no model_type": (LLAMA, {"model_type": None}, (), "got: nothing"),
    "gptq": (QWEN2, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, (), "config.json: quantization_config"),
    "yarn": (QWEN3, {"rope_parameters": None, "rope_scaling": YARN}, (), "config.json: rope_scaling"),
    "yarn in the newer form": (QWEN3, {"rope_parameters": YARN}, (), "config.json: rope_parameters"),
    "rope per layer type": (QWEN3, {"rope_parameters": LAYERS}, (), "rotary settings per layer type are not supported"),
    "sliding window": (QWEN2, {"use_sliding_window": True, "sliding_window": 64}, (), "config.json: use_sliding_window"),
    "sliding layers": (QWEN3, {"layer_types": ["sliding_attention"] * 4}, (), "config.json: layer_types"),
    "mixtral's window": (MIXTRAL, {"sliding_window": 4096}, (), "config.json: sliding_window"),
    "attention bias": (LLAMA, {"attention_bias": True}, (), "config.json: attention_bias"),
    "mlp bias": (LLAMA, {"mlp_bias": True}, (), "config.json: mlp_bias"),
    "activation": (LLAMA, {"hidden_act": "gelu"}, (), "config.json: hidden_act"),
    "head groups": (LLAMA, {"num_key_value_heads": 3}, (), "config.json: num_key_value_heads"),
    "head groups by default": (QWEN2, {"num_key_value_heads": ...}, (), "this is transformers' default"),
    "too many experts": ("qwen3_moe", {"num_experts_per_tok": 9}, (), "config.json: num_experts_per_tok"),
    "missing size": ("deepseek_v3", {"n_group": ...}, (), "config.json: n_group: this entry is missing"),
    "attention heads": (LLAMA, {"num_key_value_heads": 1}, ("parallel.tp=3",), "parallel.tp: the 4 attention heads do not divide by 3"),
    "feed-forward": (LLAMA, {"intermediate_size": 97}, ("parallel.tp=2",), "parallel.tp: the feed-forward width 97"),
    "layers": (LLAMA, {}, ("parallel.pp=3",), "parallel.pp: the 4 layers do not divide into pp 3"),
    "no experts": (LLAMA, {}, ("parallel.ep=2", "parallel.dp=2"), "parallel.ep: llama has no experts"),
    "no sequence parallelism": (MIXTRAL, {}, ("parallel.tp=2", "parallel.sp=false"), "parallel.sp: experts with tp 2"),
    "choice of experts": (
        *("deepseek_v3", {"num_experts_per_tok": 3}, ("model.megatron.moe_router_fusion=true",)),
        "model.megatron.moe_router_fusion: must be false for deepseek_v3",
    ),
}


def write(folder: Path, name: str) -> Path:
    """The run.yaml of a case; the rows of data are never read."""
    variant, changes, _, _ = CASES[name]
    config = {key: value for key, value in {**raw_of(variant), **changes}.items() if value is not ...}
    folder /= name.replace(" ", "_")
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "train.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    text = "model: {hf: model, dtype: float32}\ndata: {train: train.jsonl, max_prompt_tokens: 64}\nrun: {device: cpu, dir: run}\n"
    (folder / "run.yaml").write_text(text + "rollout: {max_response_tokens: 64}\n")
    return folder / "run.yaml"


def _build(rank: int, files: dict[str, Path]) -> dict[str, str]:
    """What the builder says of each case."""
    from megatron_rpp.mcore.policy import Policy

    said = {}
    with tiny.megatron(tiny.make_config(Path("unused"))) as groups:
        for name, file in files.items():
            try:
                Policy.from_config(load(file, CASES[name][2]), groups)
            except RppError as error:
                said[name] = str(error)
    return said


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder, name) for name in CASES}


@pytest.fixture(scope="module")
def built(files: dict[str, Path]) -> dict[str, str]:
    return run_ranks(1, _build, files, init=False, timeout_s=150.0)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("command", ["check", "train"])
def test_check_says_what_the_builder_says(
    name: str, command: str, files: dict[str, Path], built: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    *_, settings, named = CASES[name]
    assert main([command, str(files[name]), *settings]) == 2
    printed = capsys.readouterr()
    assert named in built[name]
    assert textwrap.indent(built[name], "    ").strip() in printed.err
    assert "1 setting is wrong" in printed.err and printed.out == ""
    assert not (files[name].parent / "run").exists(), "nothing was started"
