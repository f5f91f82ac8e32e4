"""Block-FP8 linear layers on a CPU, as the CUDA kernels compute them.

SGLang has this product for CUDA, ROCm and, with AMX, for packed weights whose activations stay in bfloat16. Here the
activations are quantised too, so that a run without a GPU shows what roll-outs in FP8 cost:

    s[t, g] = max(max_k |x[t, k]|, 1e-10) / 448                       k in group g of 128 columns
    q[t, k] = E4M3(clamp(x[t, k] / s[t, g], -448, 448))
    y[t, n] = sum_k (q[t, k] * s[t, g(k)]) * (w[n, k] * scale_inv[n // 128, k // 128])

in float32, then cast to the dtype of x, then plus bias. The kernels multiply E4M3 numbers and scale the sum of each group,
which is the same up to the rounding of float32.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator

GROUP = 128
MAX = 448.0  # the largest E4M3 number
SMALLEST = 1e-10  # SGLang's eps: what the largest of a group counts as at least


def round_activations(x: Tensor) -> Tensor:
    """q * s of the docstring above, in float32. Shapes: [tokens, columns] -> the same; columns is a multiple of 128."""
    groups = x.to(torch.float32).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST) / MAX
    return ((groups / scale).clamp(-MAX, MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale).flatten(-2)


def dequantise(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """w * scale_inv of its block, in float32. Shapes: [rows, columns] E4M3, [ceil(rows / 128), ceil(columns / 128)]."""
    wide = scale_inv.repeat_interleave(GROUP, dim=0).repeat_interleave(GROUP, dim=1)
    return weight.to(torch.float32) * wide[: weight.shape[0], : weight.shape[1]]


def linear(x: Tensor, weight: Tensor, scale_inv: Tensor) -> Tensor:
    """y of the docstring above, before the cast. Shapes: [tokens, columns], [rows, columns] -> [tokens, rows] float32"""
    return torch.mm(round_activations(x), dequantise(weight, scale_inv).t())


def _make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def triton_w8a8_block_fp8_linear(
        input: Tensor,
        weight: Tensor,
        block_size: list[int],
        weight_scale: Tensor,
        *,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        act_scale_ue8m0: bool = False,
    ) -> Tensor:
        if input.device.type != "cpu":
            rest = {"input_scale": input_scale, "bias": bias, "act_scale_ue8m0": act_scale_ue8m0}
            return original(input, weight, block_size, weight_scale, **rest)
        if list(block_size) != [GROUP, GROUP] or input_scale is not None or act_scale_ue8m0:
            given = f"blocks {block_size}, scales given {input_scale is not None}, powers of two {act_scale_ue8m0}"
            raise ValueError(f"block FP8 on a CPU has blocks of 128 x 128 and makes its own scales: {given}")
        y = linear(input.flatten(0, -2), weight, weight_scale).to(input.dtype)
        y = y if bias is None else y + bias
        return y.view(*input.shape[:-1], weight.shape[0])

    return triton_w8a8_block_fp8_linear


def _probe() -> None:
    from sglang.srt.layers.quantization import fp8_utils

    x, weight = torch.zeros(2, 256), torch.ones(128, 256).to(torch.float8_e4m3fn)
    x[0, 0], x[0, 1], x[1, 200] = 448.0, 17.0, 3.0  # 17 lies between the E4M3 numbers 16 and 18, and goes to the even one
    got: Any = fp8_utils.triton_w8a8_block_fp8_linear(x, weight, [128, 128], torch.tensor([[2.0, 0.5]]))
    assert got[:, 5].tolist() == [928.0, 1.5], got[:, 5]


PATCH = Patch(
    id="p107-fp8-linear-on-cpu",
    library="sglang",
    target="sglang.srt.layers.quantization.fp8_utils:triton_w8a8_block_fp8_linear",
    kind="wrap",
    why="a linear layer in block FP8 fails on a CPU without AMX: its only kernels are for CUDA, ROCm and XPU",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="dispatch_w8a8_block_fp8_linear has a CPU leg that quantises activations",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_an_fp8_linear_layer_has_no_kernel_on_a_cpu_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
