"""Block FP8, as SGLang serves it: E4M3 weights with one float32 scale for every 128 x 128 block.

The grid of blocks is anchored at the first element of each HF tensor, never at a fused or cut one, so that a shard that is
quantised where it lies gives the bits that quantising the whole tensor would. `is_aligned` says which rectangles allow that.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2, weights; the format of its published checkpoints, which SGLang reads
with weight_block_size [128, 128]. verl picks tensors by substrings, "gate" among them, and so quantises routers; here the
module's exact name decides.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rpp.errors import NumericsError
from megatron_rpp.weights.rect import Rect, Shape

BLOCK = 128
DTYPE = torch.float8_e4m3fn
MAX = 448.0  # the largest E4M3 number
SCALE_ENDING = "_scale_inv"  # of `X.weight` the scales are `X.weight_scale_inv`
# What a scale is at least, so that no division meets a subnormal: the smallest normal float32.
_TINY = torch.finfo(torch.float32).tiny

Scales = Literal["float32", "power_of_two"]  # power_of_two: UE8M0, what Blackwell multiplies by, as float32 numbers

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_MIXTRAL = ("w1", "w2", "w3")
QUANTISED_MODULES = frozenset((*_PROJECTIONS, *_MLA, *_MIXTRAL))

# What an HF config.json says of a checkpoint in this form. SGLang itself leaves out all that is_quantised does; the head is
# named for other readers.
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
}


def is_quantised(name: str) -> bool:
    """Whether an HF tensor is stored in FP8: the matrices of attention, MLPs and experts.

    Embeddings, head, norms, routers (`mlp.gate`), gates of shared experts and all biases keep their precision.
    """
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in QUANTISED_MODULES


def scale_shape(shape: Shape) -> Shape:
    """Shapes: of a weight [rows, cols] -> of its scales [ceil(rows / 128), ceil(cols / 128)]."""
    rows, cols = shape
    return math.ceil(rows / BLOCK), math.ceil(cols / BLOCK)


def checkpoint_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors of the model as a block-FP8 checkpoint holds them, each with its scales after it."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        found[name] = shape
        if is_quantised(name):
            found[name + SCALE_ENDING] = scale_shape(shape)
    return found


def checkpoint_tensors(tensors: Iterable[tuple[str, Tensor]], *, scales: Scales = "float32") -> Iterator[tuple[str, Tensor]]:
    """Whole HF tensors as a block-FP8 checkpoint holds them. Raises: NumericsError for an element that is not finite."""
    for name, tensor in tensors:
        if is_quantised(name):
            values, inverse = quantise(tensor, scales=scales, name=name)
            yield name, values
            yield name + SCALE_ENDING, inverse
        else:
            yield name, tensor


def is_aligned(rect: Rect, shape: Shape) -> bool:
    """Whether a rectangle of an HF tensor of this shape is made of whole blocks, those at the tensor's far edges included."""
    ends = ((rect.row + rect.rows, shape[0]), (rect.col + rect.cols, shape[1]))
    starts_on_grid = rect.row % BLOCK == rect.col % BLOCK == 0
    return starts_on_grid and all(end % BLOCK == 0 or end == size for end, size in ends)


def scale_rect(rect: Rect) -> Rect:
    """The scales that belong to an aligned rectangle, as a rectangle of the scales' own tensor."""
    rows, cols = scale_shape((rect.rows, rect.cols))
    return Rect(rect.hf + SCALE_ENDING, rect.row // BLOCK, rect.col // BLOCK, rows, cols)


def quantise(weight: Tensor, *, scales: Scales = "float32", name: str = "weight") -> tuple[Tensor, Tensor]:
    """A matrix in block FP8.

    scale_inv[i, j] = max |block| / 448   (1 for a block of zeros; rounded up to a power of two with scales="power_of_two")
    weight_e4m3     = block / scale_inv[i, j], rounded to nearest even
    Shapes: weight [rows, cols], any float dtype -> ([rows, cols] E4M3, [ceil(rows / 128), ceil(cols / 128)] float32)
    Raises: NumericsError naming `name` for an element that is not finite.
    Source: DeepSeek-V3's weight_cast, which divides by the scale as here; Transformer Engine multiplies by 448 / max instead, which
    may differ in the last bit. A block of zeros has scale 0 or NaN elsewhere.
    On a GPU with triton the same bits come from one kernel, quantise_triton.
    """
    kernel = _kernel() if weight.is_cuda else None
    if kernel is not None:
        values, scale, largest = kernel(weight, power_of_two=scales == "power_of_two")
        _check_finite(largest, name)
        return values, scale
    rows, cols = weight.shape
    blocks = _to_blocks(weight.to(torch.float32))
    largest = blocks.abs().amax(dim=(1, 3))
    _check_finite(largest, name)
    scale = torch.where(largest > 0, (largest / MAX).clamp_min(_TINY), 1.0)
    if scales == "power_of_two":
        fraction, exponent = torch.frexp(scale)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # 0.5 * 2^e is a power of two already
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    quotient = (blocks / scale[:, None, :, None]).clamp_(-MAX, MAX)
    return _from_blocks(quotient, rows, cols).to(DTYPE), scale


@cache
def _kernel() -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """The kernel; None where there is no triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("megatron_rpp.weights.quantise_triton").quantise_blocks


def _check_finite(largest: Tensor, name: str) -> None:
    """largest: the largest absolute value of every block."""
    if not torch.isfinite(largest).all():
        block = (~torch.isfinite(largest)).nonzero()[0].tolist()
        span = f"[{block[0] * BLOCK}:{(block[0] + 1) * BLOCK}, {block[1] * BLOCK}:{(block[1] + 1) * BLOCK}]"
        raise NumericsError("not finite, so it has no FP8 form", where=f"{name}{span}", fix="the step before it has diverged")


def dequantise(weight: Tensor, scale_inv: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """weight * scale_inv of its block, in float32, then cast.

    Shapes: [rows, cols] E4M3, [ceil(rows / 128), ceil(cols / 128)] -> [rows, cols]
    """
    rows, cols = weight.shape
    return _from_blocks(_to_blocks(weight.to(torch.float32)) * scale_inv[:, None, :, None], rows, cols).to(dtype)


def _to_blocks(matrix: Tensor) -> Tensor:
    """[rows, cols] -> [row blocks, 128, column blocks, 128], zeros beyond the edges."""
    rows, cols = matrix.shape
    padded = functional.pad(matrix, (0, -cols % BLOCK, 0, -rows % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _from_blocks(blocks: Tensor, rows: int, cols: int) -> Tensor:
    return blocks.reshape(blocks.shape[0] * BLOCK, blocks.shape[2] * BLOCK)[:rows, :cols].contiguous()
