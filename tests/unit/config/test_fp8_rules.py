"""Block FP8 in the engine: what cannot be is said before anything starts, and what can is let through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.__main__ import main
from megatron_rpp.config import fp8_rules
from megatron_rpp.config.load import load
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError
from tests.unit.config.conftest import QWEN, Write

DENSE = QWEN | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
MOE = DENSE | {
    "model_type": "qwen2_moe",
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
MOE |= {"shared_expert_intermediate_size": 512}
DEEPSEEK = MOE | {"model_type": "deepseek_v3", "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
DEEPSEEK |= {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
FP8, TWO, CUDA = "rollout.dtype=fp8_block", ("parallel.dp=2", "rollout.tp=2"), ("run.device=cuda", "model.dtype=bfloat16")
GQA = "height of the keys and of the values"

ACCEPTED = [
    (DENSE, ()),
    (DENSE, TWO),
    (DENSE, ("parallel.dp=4", "rollout.tp=4")),  # each key-value head on two ranks
    (DENSE | {"vocab_size": 301}, ()),  # the embedding keeps its precision
    (MOE, TWO),
    (MOE, ("parallel.dp=4", "rollout.tp=4", "rollout.sglang.ep_size=2")),
    (DEEPSEEK, CUDA),
    (DEEPSEEK, (*CUDA, *TWO)),
]
REFUSED = [
    (QWEN, (), ("rollout.dtype: fp8_block needs multiples of 128, the hidden size of this qwen2 is 64",)),
    (DENSE | {"intermediate_size": 500}, (), ("rollout.dtype: fp8_block needs multiples of 128, the feed-forward width",)),
    (DENSE | {"head_dim": 32}, (), (f"rollout.dtype: fp8_block needs multiples of 128, the {GQA} of this qwen2 is 64",)),
    (DENSE | {"head_dim": 64}, TWO, (f"rollout.tp: fp8_block needs multiples of 128 on each rank: cut in 2, the {GQA} of 128 leaves 64;",)),
    (
        DENSE | {"intermediate_size": 384},
        TWO,
        ("rollout.tp: fp8_block needs multiples of 128 on each rank: cut in 2, the feed-forward width of 384 leaves 192",),
    ),
    (
        MOE,
        ("parallel.dp=4", "rollout.tp=4"),
        ("rollout.tp: fp8_block needs multiples of 128 on each rank: cut in 4, the width of an expert of 256 leaves 64",),
    ),
    (
        MOE | {"shared_expert_intermediate_size": 384},
        TWO,
        ("rollout.tp: fp8_block needs multiples of 128 on each rank: cut in 2, the width of the shared expert of 384",),
    ),
    (DEEPSEEK, (), ("rollout.dtype: deepseek_v3 has latent attention, for which SGLang has no FP8 on a CPU; set model",)),
    (DEEPSEEK | {"kv_lora_rank": 96}, CUDA, ("rollout.dtype: fp8_block needs multiples of 128, the width of latent keys and values",)),
    (DENSE, ("run.device=cuda",), ("rollout.dtype: on a GPU SGLang's FP8 needs model.dtype bfloat16, got float32",)),
    (DENSE, ("rollout.sglang.quantization=fp8",), ("rollout.sglang.quantization: cannot be set with rollout.dtype fp8_block",)),
    (DENSE, ("rollout.sglang.kv_cache_dtype=fp8_e4m3",), ("rollout.sglang.kv_cache_dtype: cannot be set with rollout.dtype fp8_block",)),
]


@pytest.mark.parametrize(("config", "overrides"), ACCEPTED)
def test_whole_blocks_on_every_rank_are_let_through(project: Path, write: Write, config: dict, overrides: tuple[str, ...]) -> None:
    write("model/config.json", json.dumps(config))
    validate(load(project, [FP8, *overrides]))


@pytest.mark.parametrize(("config", "overrides", "messages"), REFUSED)
def test_what_has_no_fp8_is_refused_by_name(project: Path, write: Write, config: dict, overrides: tuple[str, ...], messages: tuple) -> None:
    write("model/config.json", json.dumps(config))
    validate(load(project, [word for word in overrides if "sglang" not in word]))  # with the model's own dtype all is well
    with pytest.raises(ConfigError) as caught:
        validate(load(project, [FP8, *overrides]))
    lines = str(caught.value).splitlines()[1:]
    for message in messages:
        assert any(message in line for line in lines), lines


def test_where_a_gpu_is_found_latent_attention_is_let_through(project: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("model/config.json", json.dumps(DEEPSEEK))
    monkeypatch.setattr(fp8_rules, "num_gpus", lambda: 1)
    validate(load(project, [FP8, "run.device=auto", "model.dtype=bfloat16"]))


def test_check_says_the_precision_of_the_roll_out(project: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("model/config.json", json.dumps(DENSE))
    said = []
    for override in ("rollout.dtype=model", FP8):
        assert main(["check", str(project), override]) == 0
        said += [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.split()[0] == "roll-out"]
    assert said == ["float32, as the model", "matrices in E4M3, blocks of 128 x 128; the rest in float32"]
