"""Block FP8 against a slow oracle, by hand, and in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.errors import NumericsError
from megatron_rpp.weights.quantise import BLOCK, dequantise, is_aligned, is_quantised, quantise, scale_rect, scale_shape
from megatron_rpp.weights.rect import Rect

# Every finite E4M3 number, from its definition: sign, 4 bits of exponent (bias 7), 3 of fraction; S.1111.111 is NaN.
E4M3 = sorted(
    sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
    for sign in (-1, 1)
    for exponent in range(16)
    for fraction in range(8)
    if (exponent, fraction) != (15, 7)
)


def nearest(value: float) -> float:
    """The nearest E4M3 number; on a tie the one with the even fraction, which is every second of the list."""
    positive = [number for number in E4M3 if math.copysign(1, number) > 0]
    distance = min(abs(abs(value) - number) for number in positive)
    ties = [i for i, number in enumerate(positive) if abs(abs(value) - number) == distance]
    chosen = next((i for i in ties if i % 2 == 0), ties[0])
    return math.copysign(positive[chosen], value)


def slow(weight: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    rows, cols = weight.shape
    scales = [[0.0] * math.ceil(cols / BLOCK) for _ in range(math.ceil(rows / BLOCK))]
    values = [[0.0] * cols for _ in range(rows)]
    for i, row in enumerate(scales):
        for j in range(len(row)):
            block = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].float()
            largest = block.abs().max()
            row[j] = float(largest / 448) if largest > 0 else 1.0
            for r in range(block.shape[0]):
                for c in range(block.shape[1]):
                    values[i * BLOCK + r][j * BLOCK + c] = nearest(float(block[r, c] / torch.tensor(row[j])))
    return values, scales


@pytest.mark.parametrize(("rows", "cols"), [(130, 3), (5, 260), (1, 1)])
def test_it_is_what_the_definition_says_element_by_element(rows: int, cols: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 0.02
    values, scales = slow(weight)
    quantised, scale = quantise(weight)
    assert quantised.to(torch.float64).tolist() == values
    assert scale.tolist() == scales
    assert tuple(scale.shape) == scale_shape((rows, cols))


def test_three_numbers_by_hand() -> None:
    """max 896 -> scale 2; 896 / 2 = 448, -3 / 2 = -1.5, 0.1 / 2 = 0.05 -> 0.05078125 = 13 / 256, the nearest of step 1 / 256."""
    quantised, scale = quantise(torch.tensor([[896.0, -3.0, 0.1]]))
    assert scale.tolist() == [[2.0]]
    assert quantised.float().tolist() == [[448.0, -1.5, 13 / 256]]
    assert dequantise(quantised, scale).tolist() == [[896.0, -3.0, 26 / 256]]


def test_it_divides_by_the_scale_and_does_not_multiply_by_its_inverse() -> None:
    """61 x a tie of E4M3, at scale 61: the quotient is the tie itself, which goes to the even neighbour; t x 61 x (1 / 61) is not."""
    ties = [(17 + 2 * i) / 16 * 2.0**exponent for exponent in range(-3, 6) for i in range(8)]
    quantised, scale = quantise(torch.tensor([[448.0, *ties]]) * 61)
    assert scale.tolist() == [[61.0]]
    assert quantised.float().tolist() == [[448.0, *map(nearest, ties)]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_aligned_part_quantises_to_the_same_bits_as_the_whole(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols)).to(torch.bfloat16)
    cuts = []
    for size in (rows, cols):
        edges = [*range(0, size, BLOCK), size]
        first = data.draw(st.integers(0, len(edges) - 2))
        last = data.draw(st.integers(first + 1, len(edges) - 1))
        cuts.append((edges[first], edges[last]))
    (top, bottom), (left, right) = cuts
    rect = Rect("w.weight", top, left, bottom - top, right - left)
    assert is_aligned(rect, (rows, cols))
    whole, scales = quantise(weight)
    part, part_scales = quantise(weight[top:bottom, left:right])
    where = scale_rect(rect)
    assert where.hf == "w.weight_scale_inv"
    assert torch.equal(part.view(torch.uint8), whole[top:bottom, left:right].view(torch.uint8))
    assert torch.equal(part_scales, scales[where.row : where.row + where.rows, where.col : where.col + where.cols])


def test_a_part_off_the_grid_is_not_aligned_and_has_other_scales() -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    off = Rect("w.weight", 0, 192, 256, 192)
    assert not is_aligned(off, (256, 384))
    assert not is_aligned(Rect("w.weight", 0, 0, 200, 384), (256, 384))
    part, scales = quantise(weight[:, 192:])
    whole, _ = quantise(weight)
    assert not torch.equal(part.view(torch.uint8), whole[:, 192:].view(torch.uint8))
    assert scales.shape == (2, 2)


@pytest.mark.parametrize("scales", ["float32", "power_of_two"])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 3e38])
def test_the_error_is_half_a_step_of_the_largest(scales: str, size: float) -> None:
    """3 bits of fraction: relative error 2^-4 for normal numbers; below them half of the smallest step, 2^-10 of the scale."""
    weight = (torch.rand(200, 200, generator=torch.Generator().manual_seed(1)) * 2 - 1) * size
    quantised, scale = quantise(weight, scales=scales)
    error = (dequantise(quantised, scale) - weight).abs()
    bound = torch.maximum(weight.abs() * 2**-4, scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:200, :200] * 2**-10)
    assert (error <= bound).all()


def test_scales_that_are_powers_of_two_are_the_next_above() -> None:
    weight = torch.zeros(3 * BLOCK, 1)
    weight[0], weight[BLOCK], weight[2 * BLOCK] = 448.0, 449.0, 448.0 * 2**-5
    assert quantise(weight, scales="power_of_two")[1].flatten().tolist() == [1.0, 2.0, 2.0**-5]


def test_blocks_of_zeros_and_of_subnormals_stay_finite() -> None:
    weight = torch.zeros(2 * BLOCK, BLOCK)
    weight[BLOCK:] = 1e-42
    quantised, scale = quantise(weight)
    assert scale.flatten().tolist() == [1.0, torch.finfo(torch.float32).tiny]
    assert torch.isfinite(dequantise(quantised, scale)).all()
    assert (quantised[:BLOCK].float() == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_place(bad: float) -> None:
    weight = torch.ones(300, 300)
    weight[290, 5] = bad
    with pytest.raises(NumericsError, match=r"q_proj\.weight\[256:384, 0:128\]: not finite"):
        quantise(weight, name="model.layers.0.self_attn.q_proj.weight")


def test_routers_heads_and_norms_keep_their_precision() -> None:
    layer = "model.layers.3"
    kept = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        f"{layer}.mlp.gate.weight",
        f"{layer}.mlp.gate.e_score_correction_bias",
        f"{layer}.mlp.shared_expert_gate.weight",
        f"{layer}.block_sparse_moe.gate.weight",
        f"{layer}.self_attn.q_proj.bias",
        f"{layer}.self_attn.q_norm.weight",
        f"{layer}.self_attn.kv_a_layernorm.weight",
        f"{layer}.input_layernorm.weight",
    ]
    taken = [
        f"{layer}.self_attn.q_proj.weight",
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight",
        f"{layer}.mlp.experts.17.gate_proj.weight",
        f"{layer}.mlp.shared_experts.down_proj.weight",
        f"{layer}.block_sparse_moe.experts.0.w2.weight",
    ]
    assert [name for name in (*kept, *taken) if is_quantised(name)] == taken
