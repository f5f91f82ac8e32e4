"""The patches of SGLang: what breaks without each, and that what they put in its place is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_rpp_patches.sglang import p102_seeded_sampling, p103_batch_invariance

TORCHVISION = """
import torchvision
"""

# Everything but the torchvision schemas is left out; what fails is told in JSON.
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
print(json.dumps(failures))
"""

WITH = """
import json
import megatron_rpp_patches
megatron_rpp_patches.apply("sglang")
rows = megatron_rpp_patches.verify("sglang")
print(json.dumps({row["id"]: row["active"] for row in rows}))
"""


def _run(program: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert done.returncode == 0 or not check, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return json.loads(_run(WITHOUT).stdout.splitlines()[-1])


def test_sglang_cannot_be_imported_without_the_torchvision_schemas() -> None:
    assert "operator torchvision::nms does not exist" in _run(TORCHVISION, check=False).stderr


def test_rotary_layer_wants_vllm_on_a_cpu_without_the_patch(failures: dict[str, str]) -> None:
    assert failures["rotary"] == "ModuleNotFoundError: No module named 'vllm'"


def test_seeded_sampling_needs_a_kernel_package_on_a_cpu_without_the_patch(failures: dict[str, str]) -> None:
    assert "sgl_kernel" in failures["seeds"]


def test_deterministic_mode_refuses_a_cpu_without_the_patch(failures: dict[str, str]) -> None:
    assert "No supported accelerator" in failures["invariance"]


def test_all_patches_stand_and_their_probes_pass() -> None:
    found = json.loads(_run(WITH).stdout.splitlines()[-1])
    assert len(found) == 4
    assert all(found.values()), found


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
