"""The Triton kernel has the bits of the torch code: on a GPU, and in Triton's interpreter where one asks for it.

triton is a wheel of 200 MB that a CPU build of torch does not bring. By hand:
pip install --no-deps --target DIR triton, then TRITON_INTERPRET=1 PYTHONPATH=DIR pytest tests/unit/weights/test_quantise_triton.py
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rpp.errors import NumericsError
from megatron_rpp.weights import quantise as in_torch

# Triton looks at the variable when it is first imported, and parts of torch import it.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAN_RUN = importlib.util.find_spec("triton") is not None and (IS_INTERPRETED or torch.cuda.is_available())
pytestmark = pytest.mark.skipif(not CAN_RUN, reason="needs triton, and a GPU or TRITON_INTERPRET=1")


def kernel(weight: Tensor, *, power_of_two: bool) -> tuple[Tensor, ...]:
    """values, scales, largest of a weight on the CPU, on the CPU."""
    from megatron_rpp.weights.quantise_triton import quantise_blocks

    device = "cpu" if IS_INTERPRETED else "cuda"
    moved = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device).copy_(weight)
    return tuple(part.cpu() for part in quantise_blocks(moved, power_of_two=power_of_two))


def random(rows: int, cols: int, size: float = 1.0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols)) * size


def zeros_and_subnormals() -> Tensor:
    weight = torch.zeros(384, 256)
    weight[128:256] = 1e-42
    weight[200:] = random(184, 256) * torch.logspace(-30, 30, 256)
    return weight


def ties() -> Tensor:
    """Every tie of E4M3, subnormal ones too, of both signs, at scale 1."""
    found = [(17 + 2 * i) / 16 * 2.0**exponent for exponent in range(-6, 9) for i in range(8)]
    found += [(2 * i + 1) / 2 * 2.0**-9 for i in range(8)]
    return torch.tensor([[448.0, 0.0, -0.0, *(x for x in found if x < 448), *(-x for x in found if x < 448)]])


CASES: dict[str, Callable[[], Tensor]] = {
    "ragged": lambda: random(200, 300),
    "a single number": lambda: random(1, 1),
    "bfloat16": lambda: random(130, 3, 0.02).to(torch.bfloat16),
    "a view of columns": lambda: random(260, 400)[:, 129:399:2],
    "transposed float16": lambda: random(150, 260).to(torch.float16).t(),
    "zeros and subnormals": zeros_and_subnormals,
    "ties": ties,
    "ties at scale 61": lambda: ties() * 61,
    "every step of 2^-12": lambda: torch.arange(-448 * 64, 448 * 64 + 1)[None] / 2.0**6,
    "huge": lambda: random(140, 140).clamp(-1, 1) * 3e38,
}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_the_torch_code(case: str) -> None:
    weight = CASES[case]()
    for scales in ("float32", "power_of_two"):
        values, scale = in_torch.quantise(weight, scales=scales)
        got, got_scale, largest = kernel(weight, power_of_two=scales == "power_of_two")
        assert got.dtype == values.dtype and got_scale.dtype == scale.dtype
        assert torch.equal(got.view(torch.uint8), values.view(torch.uint8)) and torch.equal(got_scale, scale), scales
        assert torch.isfinite(largest).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_block(bad: float) -> None:
    weight = torch.ones(300, 300)
    weight[290, 5] = bad
    largest = kernel(weight, power_of_two=False)[2]
    assert (~torch.isfinite(largest)).nonzero().tolist() == [[2, 0]]


@pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_quantise_is_the_kernel() -> None:
    weight = random(300, 300)
    values, scale = in_torch.quantise(weight.cuda())
    expected = in_torch.quantise(weight)
    assert in_torch._kernel() is not None
    assert torch.equal(values.cpu().view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scale.cpu(), expected[1])
    weight[290, 5] = torch.nan
    with pytest.raises(NumericsError, match=r"q_proj\.weight\[256:384, 0:128\]: not finite"):
        in_torch.quantise(weight.cuda(), name="q_proj.weight")
