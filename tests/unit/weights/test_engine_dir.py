"""The directory that an engine in FP8 is started from: what it says, what it holds, and that the model's own stays as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rpp.engine_dir import server_args, write_engine_dir
from megatron_rpp.errors import NumericsError
from megatron_rpp.rollout import coverage
from megatron_rpp.rollout.settings import FOLDER_VARIABLE
from megatron_rpp.weights.families.registry import describe
from tests.unit.weights.fp8_oracle import bits, quantised
from tests.unit.weights.models import random_hf, write_source

CONFIG = {
    **{"model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 128, "vocab_size": 65, "num_experts": 2, "moe_intermediate_size": 128},
    **{"tie_word_embeddings": False, "dtype": "float32"},
}
BF16 = torch.bfloat16


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = write_source(tmp_path / "hf", CONFIG)
    save_file(random_hf(describe(CONFIG)), folder / "model.safetensors")
    return folder


def _digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("with_weights", [False, True])
def test_it_says_fp8_and_names_every_tensor_that_an_update_brings(
    hf: Path, tmp_path: Path, with_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, folder = _digest(hf), tmp_path / "run" / "engine"
    folder.mkdir(parents=True)
    (folder / "stale.safetensors").write_text("of a run before")
    write_engine_dir(folder, hf, dtype=BF16, with_weights=with_weights)
    assert _digest(hf) == before
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert {**config, "dtype": "float32", "quantization_config": None} == {**CONFIG, "quantization_config": None}
    assert (folder / "tokenizer.json").read_text() == (hf / "tokenizer.json").read_text()
    assert [file.name for file in folder.glob("*.safetensors")] == (["model.safetensors"] if with_weights else [])
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    whole = quantised(random_hf(describe(CONFIG)))
    assert coverage.write_expected(folder) == len(whole)
    assert json.loads((tmp_path / coverage.WHOLE_FILE).read_text()) == {name: list(tensor.shape) for name, tensor in whole.items()}


def test_its_weights_are_those_of_the_policys_dtype_quantised(hf: Path, tmp_path: Path) -> None:
    """A policy in bfloat16 rounds first, so an engine that reads its weights does too."""
    write_engine_dir(tmp_path / "engine", hf, dtype=BF16, with_weights=True)
    expected = quantised({name: tensor.to(BF16) for name, tensor in random_hf(describe(CONFIG)).items()})
    got = load_file(tmp_path / "engine" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(bits(got[name]), bits(tensor)), name


def test_sglang_reads_weights_only_to_evaluate_and_keeps_float32_scales_on_every_gpu() -> None:
    assert server_args(reads_weights=False, capability=9) == server_args(reads_weights=False, capability=None) == {"load_format": "dummy"}
    assert server_args(reads_weights=True, capability=9) == {}
    assert server_args(reads_weights=True, capability=10) == {"fp8_gemm_runner_backend": "triton"}


def test_a_weight_that_is_not_finite_is_named(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = float("inf")
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight\[0:128, 0:128\]"):
        write_engine_dir(tmp_path / "engine", hf, dtype=torch.float32, with_weights=True)
