"""Block FP8 on a GPU in one pass: a Triton kernel with the bits of quantise.quantise. Used where triton can be imported.

torch reads and writes a matrix about ten times for this, most of them as float32; here each block is read once and stays in
registers. E4M3 numbers are put together from bits: not every GPU converts to them, and every way to convert has its own idea of
what rounds where.
Source: DeepSeek-V3's kernel.py, weight_quant and act_quant, are the same pass; they convert by the hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128
_MAX, _TINY = 448.0, torch.finfo(torch.float32).tiny


def quantise_blocks(weight: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(weight in E4M3, scales, largest absolute value of each block, infinite where some element is not finite).

    Shapes: [rows, cols], any strides -> [rows, cols], [row blocks, column blocks] float32, the same.
    """
    rows, cols = weight.shape
    grid = (triton.cdiv(rows, _BLOCK), triton.cdiv(cols, _BLOCK))
    bits = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(grid, dtype=torch.float32, device=weight.device)
    largest = torch.empty_like(scale)
    sizes = (rows, cols, *weight.stride())
    constants = {"POWER_OF_TWO": power_of_two, "BLOCK": _BLOCK, "MAX": _MAX, "TINY": _TINY}
    _quantise[grid](weight, bits, scale, largest, *sizes, **constants, num_warps=8)
    return bits.view(torch.float8_e4m3fn), scale, largest


@triton.jit
def _quantise(
    weight,
    bits,
    scales,
    largests,
    rows,
    cols,
    row_stride,
    col_stride,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX: tl.constexpr,
    TINY: tl.constexpr,
):
    """One block. 64-bit offsets: a matrix may have more than 2^31 elements."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    is_inside = (row < rows) & (col < cols)
    value = tl.load(weight + row * row_stride + col * col_stride, mask=is_inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    size = tl.where(size < float("inf"), size, float("inf"))  # also of a not-a-number, which no comparison holds for
    largest = tl.max(tl.max(size, axis=1), axis=0)
    scale = tl.maximum(tl.div_rn(largest, MAX), TINY)
    scale = tl.where(largest > 0, scale, 1.0)
    if POWER_OF_TWO:  # any bit of the fraction carries into the exponent
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    quotient = tl.minimum(tl.div_rn(size, tl.full([BLOCK, BLOCK], 1.0, tl.float32) * scale), MAX)
    number = quotient.to(tl.int32, bitcast=True)
    # Normal: 20 of 23 bits of the fraction are rounded off, to even, and the exponent's bias goes from 127 to 7.
    normal = ((number + 0x7FFFF + ((number >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6: a whole number of steps of 2^-9. Adding 2^23 leaves no room for a fraction, so it is rounded to even.
    steps = (quotient * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    magnitude = tl.where(quotient < 0.015625, steps, normal)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    tl.store(bits + row * cols + col, (magnitude | sign).to(tl.uint8), mask=is_inside)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scales + place, scale)
    tl.store(largests + place, largest)
