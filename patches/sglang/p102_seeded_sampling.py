"""Per-request seeds on any CPU.

SGLang draws token c of a request at position p by Gumbel-max over hash(seed, p, c), so that a seed gives the same tokens
in any batch. On a CPU its hash is an AMX kernel and the function is compiled with inductor at the first token. Here the
same MurmurHash3 and the same noise in plain torch, integer for integer those of the Triton kernel.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator

LOW_32 = 0xFFFFFFFF
CHUNK = 1 << 17  # elements hashed at a time, so that the many passes over them stay in the cache
NUM_BYTES = 16  # seed 8, position 4, column 4
SMALLEST_STEP = 2.0**-32  # spacing of the 32-bit uniforms; keeps x = 1 from giving infinite noise


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & LOW_32


def _mix(state: Tensor, block: Tensor) -> Tensor:
    block = _rotate(block * 0xCC9E2D51 & LOW_32, 15) * 0x1B873593 & LOW_32
    return _rotate(state ^ block, 13) * 5 + 0xE6546B64 & LOW_32


def murmur_hash32(seed: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """MurmurHash3 of (seed low, seed high, position, column) in int64, whose low 32 bits stay right. [n], [n], [m] -> [n, m]"""
    seed = seed.to(torch.int64)
    state = torch.zeros_like(seed)
    for block in (seed & LOW_32, (seed >> 32) & LOW_32, positions.to(torch.int64) & LOW_32):
        state = _mix(state, block)
    state = _mix(state[:, None], columns.to(torch.int64)[None, :]) ^ NUM_BYTES
    state = (state ^ (state >> 16)) * 0x85EBCA6B & LOW_32
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & LOW_32
    return state ^ (state >> 16)


def _sample_rows(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    columns = torch.arange(logprobs.shape[1], device=logprobs.device)
    uniform = murmur_hash32(seed, positions, columns).to(torch.float64) / LOW_32
    noise = uniform.log_().clamp_(min=torch.finfo(torch.float64).min, max=-SMALLEST_STEP).neg_().log_().neg_()
    return torch.argmax(noise.add_(logprobs), dim=1, keepdim=True)


def _sample(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    rows = max(1, CHUNK // logprobs.shape[1])
    chunks = zip(logprobs.split(rows), seed.split(rows), positions.split(rows), strict=True)
    return torch.cat([_sample_rows(*chunk) for chunk in chunks])


def _make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def multinomial_with_seed(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
        return _sample(logprobs, seed, positions) if logprobs.device.type == "cpu" else original(logprobs, seed, positions)

    return multinomial_with_seed


def _probe() -> None:
    seed, positions, columns = torch.tensor([0, 1 << 40]), torch.tensor([0, 7]), torch.arange(3)
    got = murmur_hash32(seed, positions, columns).tolist()
    assert got == HASHES, got


HASHES = [[2167721464, 10027521, 2423355346], [4137742598, 1499766731, 117167883]]  # by the definition, in plain integers

PATCH = Patch(
    id="p102-seeded-sampling",
    library="sglang",
    target="sglang.srt.layers.sampler:multinomial_with_seed",
    kind="wrap",
    why="a request with sampling_seed fails on a CPU without AMX: No module named 'sgl_kernel'",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="murmur_hash32 has a CPU leg that needs no kernel package",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_seeded_sampling_needs_a_kernel_package_on_a_cpu_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
