"""SGLangLayout against SGLang's own model classes: after load_weights, every parameter of every rank is what the layout says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.rollout.coverage import CACHE_SCALES
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8 import Fp8Target, final_locals
from megatron_rpp.weights.quantise import QUANTIZATION_CONFIG
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.unit.weights.fp8_oracle import bits, covered, cut, quantised
from tests.unit.weights.models import filled, random_hf, same
from tests.unit.weights.sglang_oracle import sglang_ranks

DTYPE = torch.bfloat16
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
QWEN_MOE = {**SIZES, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "scoring_func": "softmax",
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES},
    "llama-tied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SIZES},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **SIZES, "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **SIZES, "head_dim": 16, "tie_word_embeddings": True},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        **QWEN_MOE,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3-moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **QWEN_MOE, "head_dim": 16},
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **SIZES,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        **DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "greedy",
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        **DEEPSEEK,
        "topk_method": "group_limited_greedy",
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        **DEEPSEEK,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1,
    },
}
# (model, tp, ep, attn_dp): fewer KV heads than ranks, experts cut and shared, attention in fewer parts than the rest.
CASES = [
    *(("llama", tp, 1, 1) for tp in (1, 2, 8)),
    ("llama-tied", 4, 1, 1),
    *(("qwen2", tp, 1, 1) for tp in (1, 2, 8)),
    *(("qwen3", tp, 1, attn_dp) for tp, attn_dp in ((1, 1), (2, 1), (8, 1), (4, 2))),
    ("qwen3-tied", 2, 1, 1),
    *((model, *split) for model in ("qwen2-moe", "qwen3-moe") for split in ((1, 1, 1), (4, 1, 1), (4, 2, 1), (4, 4, 2), (8, 2, 4))),
    *(("mixtral", *split) for split in ((1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 8, 1))),
    *((f"deepseek-{name}", *split) for name in ("v2-lite", "v2", "v3") for split in ((1, 1, 1), (4, 2, 1), (4, 4, 2), (8, 2, 4))),
]

# The same in block FP8, wide enough for whole blocks on two ranks. SGLang's Mixtral and Qwen2-MoE know no head_dim.
FP8_SIZES = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
FP8_QWEN_MOE = {**FP8_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
FP8_MODELS: dict[str, dict[str, Any]] = {
    "fp8-qwen2": {**MODELS["qwen2"], **FP8_SIZES},
    "fp8-qwen3": {**MODELS["qwen3"], **FP8_SIZES},
    "fp8-qwen2-moe": {**MODELS["qwen2-moe"], **FP8_QWEN_MOE, "num_attention_heads": 2, "shared_expert_intermediate_size": 256},
    "fp8-qwen3-moe": {**MODELS["qwen3-moe"], **FP8_QWEN_MOE},
    "fp8-mixtral": {**MODELS["mixtral"], **FP8_SIZES, "num_attention_heads": 2, "num_local_experts": 4},
    "fp8-deepseek-v3": {
        **MODELS["deepseek-v3"],
        **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"moe_intermediate_size": 256, "kv_lora_rank": 128, "q_lora_rank": 128},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
    },
}
FP8_CASES = [
    *((f"fp8-{name}", tp, 1, 1) for name in ("qwen2", "qwen3", "mixtral", "qwen3-moe", "deepseek-v3") for tp in (1, 2)),
    ("fp8-qwen2-moe", 2, 1, 1),
    ("fp8-qwen3-moe", 2, 2, 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, built by one process: SGLang takes half a minute to import."""
    root = tmp_path_factory.mktemp("classes")
    for name, config in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        torch.save(random_hf(describe(config), DTYPE), root / f"{name}.pt")
    for name, config in FP8_MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION_CONFIG}))
        torch.save(quantised(random_hf(describe(config), DTYPE)), root / f"{name}.pt")
    cases = [dict(zip(("model", "tp", "ep", "attn_dp"), case, strict=True)) for case in CASES + FP8_CASES]
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.sglang.model_classes", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_model_class_holds_what_the_layout_and_the_oracle_say(folder: Path, number: int) -> None:
    name, tp, ep, attn_dp = CASES[number]
    model = describe(MODELS[name])
    hf = random_hf(model, DTYPE)
    layout = SGLangLayout(model, tp, DTYPE, ep=ep, attn_dp=attn_dp)
    oracle = sglang_ranks(MODELS[name], hf, tp=tp, ep=ep, attn_dp=attn_dp)
    for rank, tensors in enumerate(filled(layout, hf)):
        real = torch.load(folder / f"{number}-{rank}.pt")
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in real.items()
        }
        for key, tensor in tensors.items():
            own = ~tensor.isnan()  # the padding of the vocabulary belongs to nobody
            assert torch.equal(tensor[own], real[key][own]), (rank, key)
            assert same(tensor, oracle[rank][key]), (rank, key)
            assert own.all() or key in ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("number", range(len(FP8_CASES)), ids=["-".join(map(str, case)) for case in FP8_CASES])
def test_in_fp8_the_model_class_holds_slices_of_the_quantised_whole_tensors(folder: Path, number: int) -> None:
    """What a direct update announces and brings is what SGLang's loader makes of a whole checkpoint in FP8, to the bit."""
    name, tp, ep, attn_dp = FP8_CASES[number]
    model = describe(FP8_MODELS[name])
    whole = quantised(random_hf(model, DTYPE))
    layout = SGLangLayout(model, tp, DTYPE, ep=ep, attn_dp=attn_dp)
    target = Fp8Target(layout, frozenset(), tuple(model.hf_shapes.items()))
    for rank in range(tp):
        real = torch.load(folder / f"{len(CASES) + number}-{rank}.pt")
        wanted = final_locals(target, rank)
        assert {local.name: (local.shape, local.dtype) for local in wanted} == {
            key: (tuple(tensor.shape), tensor.dtype) for key, tensor in real.items() if not key.endswith(CACHE_SCALES)
        }
        for local in wanted:
            mask = covered(local)
            assert torch.equal(bits(real[local.name])[mask], bits(cut(local, whole))[mask]), (rank, local.name)
