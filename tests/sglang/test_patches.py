"""The patches of SGLang: what breaks without each, and that what they put in its place is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch

from megatron_rpp_patches.sglang import (
    PATCHES,
    p102_seeded_sampling,
    p103_batch_invariance,
    p105_shared_expert_gate_on_cpu,
    p107_fp8_linear_on_cpu,
    p110_noise_by_vocabulary,
)
from tests.sglang.test_sglang_layout import MODELS

TORCHVISION = """
import torchvision
"""
# PyPI's torchvision beside a CPU build of torch. Otherwise its C++ part loads and the patch is inactive.
BUILDS_DIFFER = torch.version.cuda is None and not metadata.version("torchvision").endswith("+cpu")

# Everything but the torchvision schemas is left out, to the last lines; what fails is told in JSON.
WITHOUT = """
import json, sys
import torch
from megatron_rpp_patches.sglang import p100_torchvision_schemas as schemas
if schemas.PATCH.inactive() is None:
    schemas.PATCH.enable()
failures = {}
def attempt(name, call):
    try:
        call()
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
attempt("rotary", lambda: RotaryEmbedding(16, 16, 64, 10000, True, torch.float32))
from sglang.srt.layers import sampler
torch.compiler.set_stance("force_eager")
attempt("seeds", lambda: sampler.multinomial_with_seed(torch.zeros(1, 4), torch.tensor([1]), torch.tensor([0])))
from sglang.srt.batch_invariant_ops import enable_batch_invariant_mode
attempt("invariance", enable_batch_invariant_mode)
from sglang.srt.layers.rotary_embedding.factory import get_rope_wrapper
attempt("latent rotary", lambda: get_rope_wrapper(2, 2, 4, 10000, is_neox_style=False, device="cpu"))
from sglang.kernels.ops.elementwise.elementwise import fused_gate_sigmoid_mul_add
attempt("gate", lambda: fused_gate_sigmoid_mul_add(torch.ones(1, 2), torch.ones(2), torch.ones(1, 2), torch.ones(1, 2)))
from types import SimpleNamespace
from sglang.srt.layers.moe import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization import fp8, fp8_utils
config = fp8.Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128])
one, matrices = torch.ones(1, 1), torch.ones(1, 256, 128).to(torch.float8_e4m3fn)
attempt("linear", lambda: fp8_utils.triton_w8a8_block_fp8_linear(torch.ones(1, 128), matrices[0, :128], [128, 128], one))
attempt("float32", lambda: config.get_supported_act_dtypes().index(torch.float32))
def experts():
    method = fp8.Fp8MoEMethod(config)
    weights = {"w13_weight": matrices, "w13_weight_scale_inv": torch.ones(1, 2, 1), "w2_weight": matrices[:, :128]}
    layer = SimpleNamespace(**weights, w2_weight_scale_inv=torch.ones(1, 1, 1), w13_input_scale=None, w2_input_scale=None)
    method.create_moe_runner(layer, MoeRunnerConfig(num_experts=1, num_local_experts=1, hidden_size=128, top_k=1))
    method.apply(layer, StandardDispatchOutput(torch.ones(1, 128), None, StandardTopKOutput(one, torch.zeros(1, 1, dtype=int), one)))
attempt("experts", experts)

# 40 seeds of one distribution: alone, and when a greedy request shares the batch; with p110 too.
from megatron_rpp_patches.sglang import p102_seeded_sampling, p110_noise_by_vocabulary
sampler.multinomial_with_seed = p102_seeded_sampling.PATCH.make(sampler.multinomial_with_seed)
probs = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).softmax(-1).expand(41, 50)
top_ks, ones = torch.tensor([1 << 30] * 40 + [1]), torch.ones(41)
seeds, positions = torch.arange(41) * 10**12, torch.arange(41)
def sampled():
    return sampler.top_k_top_p_min_p_sampling_from_probs_torch(probs, top_ks, ones, 0 * ones, False, seeds, positions).tolist()
failures["alone"] = sampler.sampling_from_probs_torch(probs[:40], seeds[:40], positions[:40]).tolist()
failures["in company"] = sampled()
mended = p110_noise_by_vocabulary.PATCH.make(sampler.top_k_top_p_min_p_sampling_from_probs_torch)
sampler.top_k_top_p_min_p_sampling_from_probs_torch = mended
failures["mended company"] = sampled()
failures["likeliest"] = int(probs[0].argmax())

# How much of DeepSeek's fused projection is filled when its halves come apart; with p106 too.
from pathlib import Path
from sglang.srt.layers.rotary_embedding import base
base._is_cpu = True
from megatron_rpp_patches.sglang import p106_latent_projections_in_pieces as mend
from sglang.srt.models.deepseek_common.deepseek_weight_loader import DeepseekV2WeightLoaderMixin as Loader
from tests.sglang import model_classes
model = model_classes.build(model_classes.server_args(Path(sys.argv[1]), {"model": "model", "tp": 1, "ep": 1, "attn_dp": 1}), 0)
at = "model.layers.0.self_attn."
fused = dict(model.named_parameters())[at + "fused_qkv_a_proj_with_mqa.weight"]
def halves():
    fused.data.fill_(-1)
    buffer = torch.empty(48 + 40, 64)
    for name, rows in (("q_a_proj", slice(0, 48)), ("kv_a_proj_with_mqa", slice(48, None))):
        buffer.fill_(rows.start + 1)  # all buckets share their memory
        model.load_weights([(at + name + ".weight", buffer[rows])])
    return [fused[0, 0].item(), fused[-1, 0].item()]
failures["halves"] = halves()
Loader.do_load_weights = mend.PATCH.make(Loader.do_load_weights)
failures["mended halves"] = halves()
print(json.dumps(failures))
"""

WITH = """
import json
import megatron_rpp_patches
megatron_rpp_patches.apply("sglang")
rows = megatron_rpp_patches.verify("sglang")
print(json.dumps({row["id"]: row["active"] for row in rows}))
"""


def _run(program: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert done.returncode == 0 or not check, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("without")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODELS["deepseek-v3"]))
    return json.loads(_run(WITHOUT, str(folder)).stdout.splitlines()[-1])


def test_sglang_cannot_be_imported_without_the_torchvision_schemas() -> None:
    """Where the builds agree, torchvision can be imported and the patch is inactive."""
    done = _run(TORCHVISION, check=False)
    assert (done.returncode != 0) == BUILDS_DIFFER, done.stderr
    assert ("operator torchvision::nms does not exist" in done.stderr) == BUILDS_DIFFER


def test_rotary_layer_wants_vllm_on_a_cpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert failures["rotary"] == "ModuleNotFoundError: No module named 'vllm'"


def test_seeded_sampling_needs_a_kernel_package_on_a_cpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert "sgl_kernel" in failures["seeds"]


def test_deterministic_mode_refuses_a_cpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert "No supported accelerator" in failures["invariance"]


def test_plain_rotary_of_latent_attention_is_refused_on_a_cpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert failures["latent rotary"].startswith("AssertionError")


def test_the_gate_of_a_shared_expert_wants_a_gpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert "0 active drivers" in failures["gate"]


def test_projections_in_two_calls_are_lost_without_the_patch(failures: dict[str, Any]) -> None:
    assert failures["halves"] == [-1.0, -1.0]
    assert failures["mended halves"] == [1.0, 49.0]


def test_a_greedy_neighbour_changes_a_seeds_tokens_without_the_patch(failures: dict[str, Any]) -> None:
    """Its own token is the likeliest either way."""
    alone, company, mended = failures["alone"], failures["in company"], failures["mended company"]
    assert len(set(alone)) > 5
    assert sum(a != b for a, b in zip(alone, company, strict=False)) > 10
    assert mended == [*alone, failures["likeliest"]]


def test_an_fp8_linear_layer_has_no_kernel_on_a_cpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert "0 active drivers" in failures["linear"]


def test_fp8_beside_float32_is_refused_without_the_patch(failures: dict[str, Any]) -> None:
    assert failures["float32"] == "ValueError: torch.float32 is not in list"


def test_fp8_experts_have_no_kernel_on_a_cpu_without_the_patch(failures: dict[str, Any]) -> None:
    assert "inplace_fused_experts" in failures["experts"]


def test_all_patches_stand_and_their_probes_pass() -> None:
    found = json.loads(_run(WITH).stdout.splitlines()[-1])
    assert list(found) == [patch.id for patch in PATCHES]
    assert {name for name, active in found.items() if not active} == (set() if BUILDS_DIFFER else {"p100-torchvision-schemas"})


def test_the_gate_of_a_shared_expert_is_its_definition_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, shared, out = (torch.randn(5, 33, generator=generator) for _ in range(3))
    gate = torch.randn(33, generator=generator)
    weights = [1 / (1 + math.exp(-float(row @ gate))) for row in hidden]
    expected = [(out[t] + weight * shared[t]).tolist() for t, weight in enumerate(weights)]
    p105_shared_expert_gate_on_cpu.add_gated(hidden, gate, shared, out)
    assert torch.allclose(out, torch.tensor(expected), atol=1e-6)


def _murmur_in_integers(seed: int, position: int, column: int) -> int:
    """MurmurHash3 (x86, 32 bit, hash seed 0) over four 4-byte blocks, as its definition says."""
    mask = 0xFFFFFFFF

    def rotate(x: int, bits: int) -> int:
        return (x << bits | x >> (32 - bits)) & mask

    state = 0
    for block in (seed & mask, seed >> 32 & mask, position, column):
        state ^= rotate(block * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        state = (rotate(state, 13) * 5 + 0xE6546B64) & mask
    state ^= 16
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return state ^ state >> 16


def test_the_hash_is_murmur3_of_seed_position_and_column() -> None:
    seeds, positions, columns = [0, 1, 2**62 + 12345, 2**63 - 1], [0, 7, 4095, 131071], [0, 1, 151935]
    got = p102_seeded_sampling.murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    for i, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert got[i].tolist() == [_murmur_in_integers(seed, position, column) for column in columns]


def test_seeds_draw_from_the_distribution_they_are_given() -> None:
    """100,000 seeds: four standard deviations of a frequency of 0.5 are 0.0063."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = 100_000
    seeds = torch.randint(0, 2**62, (draws,), generator=torch.Generator().manual_seed(0))
    logprobs = probs.log().expand(draws, 5)
    tokens = p102_seeded_sampling._sample(logprobs, seeds, torch.arange(draws) % 50).squeeze(1)
    frequencies = torch.bincount(tokens, minlength=5) / draws
    assert frequencies[4] == 0
    assert torch.allclose(frequencies, probs, atol=0.0063)


def test_a_filter_leaves_what_its_definition_says_in_the_order_of_the_vocabulary() -> None:
    """Token by token: in the first k by probability, and less than p given away before it. A row without a filter keeps its bits."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(60, 23, generator=generator).mul(3).softmax(-1)
    top_ks = torch.tensor([1, 2, 5, 23, 1 << 30]).repeat(12)
    top_ps = torch.tensor([0.1, 0.5, 0.9, 1.0]).repeat_interleave(15)
    got = p110_noise_by_vocabulary.filtered(probs, top_ks, top_ps)
    for row, found, k, p in zip(probs.tolist(), got.tolist(), top_ks.tolist(), top_ps.tolist(), strict=True):
        order = sorted(range(23), key=lambda token: -row[token])
        left, given = set(), 0.0
        for rank, token in enumerate(order):
            if p == 1.0 or given <= p:
                left.add(token) if rank < k else None
            given += row[token]
        assert found == [x if token in left else 0.0 for token, x in enumerate(row)]
    whole = (top_ks >= 23) & (top_ps == 1.0)
    assert whole.sum() > 5 and torch.equal(got[whole], probs[whole])


def test_a_draw_does_not_depend_on_how_the_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    logprobs = torch.randn(37, 101, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    seeds, positions = torch.arange(37) * 10**15, torch.arange(37)
    whole = p102_seeded_sampling._sample(logprobs, seeds, positions)
    monkeypatch.setattr(p102_seeded_sampling, "CHUNK", 1)
    assert torch.equal(p102_seeded_sampling._sample(logprobs, seeds, positions), whole)


@pytest.mark.parametrize(("inner", "columns"), [(64, 192), (77, 100), (128, 1024), (512, 128)])
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    rows, weight = torch.randn(300, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    bias = torch.randn(columns, generator=generator)
    with torch.inference_mode():
        whole = p103_batch_invariance.mm(rows, weight.T)
        whole_biased = p103_batch_invariance.addmm(bias, rows, weight.T)
        assert torch.allclose(whole, rows @ weight.T, atol=1e-4)
        assert torch.allclose(whole_biased, rows @ weight.T + bias, atol=1e-4)
        for first, last in [(0, 1), (299, 300), (5, 7), (5, 8), (0, 16), (100, 131), (0, 299)]:
            assert torch.equal(p103_batch_invariance.mm(rows[first:last], weight.T), whole[first:last])
            assert torch.equal(p103_batch_invariance.addmm(bias, rows[first:last], weight.T), whole_biased[first:last])


@pytest.mark.parametrize(("heads", "inner", "columns"), [(4, 16, 32), (3, 77, 100)])
def test_a_row_of_a_head_does_not_depend_on_the_other_rows(heads: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    rows, weight = torch.randn(heads, 60, inner, generator=generator), torch.randn(heads, inner, columns, generator=generator)
    whole = p103_batch_invariance.bmm(rows, weight)
    assert torch.allclose(whole, rows @ weight, atol=1e-4)
    for first, last in [(0, 1), (59, 60), (5, 7), (0, 16), (1, 60)]:
        strided = torch.empty(last - first, heads, columns)
        p103_batch_invariance.bmm_out(rows[:, first:last], weight, out=strided.transpose(0, 1))
        assert torch.equal(strided.transpose(0, 1), whole[:, first:last])


def test_a_score_does_not_depend_on_the_other_scores() -> None:
    scores = torch.randn(70, 8, generator=torch.Generator().manual_seed(0)) * 4
    whole = p103_batch_invariance.sigmoid(scores)
    assert torch.allclose(whole, torch.sigmoid(scores), atol=1e-6)
    assert all(torch.equal(p103_batch_invariance.sigmoid(scores[t : t + n]), whole[t : t + n]) for t in range(60) for n in (1, 2, 3, 9))


def test_an_fp8_product_is_that_of_its_definition_element_by_element() -> None:
    """Ragged edges of the weight, a group of zeros, one of tiny numbers, and one that spans the range of E4M3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 256, generator=generator)
    x[0, :128], x[1, 128:], x[2, :128] = 0, x[1, 128:] * 1e-12, x[2, :128] * 10.0 ** torch.arange(-4, 4).repeat(16)
    weight = (torch.randn(130, 256, generator=generator) * 50).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(2, 2, generator=generator) + 0.1
    got = p107_fp8_linear_on_cpu.linear(x, weight, scale_inv)
    for token in range(3):
        for row in (0, 127, 128, 129):
            total = 0.0
            for group in range(2):
                part = x[token, group * 128 : (group + 1) * 128].tolist()
                scale = torch.tensor(max(max(map(abs, part)), 1e-10)) / 448
                for column, value in enumerate(part, start=group * 128):
                    rounded = (torch.tensor(value) / scale).to(torch.float8_e4m3fn).float()
                    total += float(rounded * scale) * float(weight[row, column].float() * scale_inv[row // 128, group])
            assert got[token, row].item() == pytest.approx(total, rel=1e-4, abs=1e-5 * scale_inv.max().item())
