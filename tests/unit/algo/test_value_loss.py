"""The critic's loss: by hand, against the loop, and its gradient against differences."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.value_loss import value_loss
from tests.reference import credit as loops
from tests.reference.properties import thorough

TOKENS = 3  # of one call


def _loss(new: list[float], old: list[float], target: list[float], clip: float | None) -> tuple[list[float], list[float]]:
    new_T = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    mask_T = torch.ones(len(new), dtype=torch.bool)
    loss_T = value_loss(new_T, torch.tensor(old, dtype=torch.float64), torch.tensor(target, dtype=torch.float64), mask_T, clip=clip)
    loss_T.sum().backward()
    return loss_T.tolist(), new_T.grad.tolist()


def test_a_value_that_has_come_too_far_is_held_by_hand() -> None:
    """Old 0, target 2, clip 1/2. At 1.5 the held value is .5, farther off: 1.5^2 / 2, no gradient. At .25 nothing is held:
    1.75^2 / 2 and gradient -1.75. At -1 the value went the wrong way: its own square is the larger, 9 / 2, gradient -3."""
    assert _loss([1.5, 0.25, -1.0], [0.0] * 3, [2.0] * 3, 0.5) == ([1.125, 1.53125, 4.5], [0.0, -1.75, -3.0])


def test_without_a_clip_it_is_half_the_squared_distance() -> None:
    assert _loss([1.5, -1.0], [0.0] * 2, [2.0] * 2, None) == ([0.125, 4.5], [-0.5, -3.0])


def test_nan_outside_the_mask_reaches_neither_value_nor_gradient() -> None:
    new_T = torch.tensor([math.nan, 1.0], requires_grad=True)
    garbage_T = torch.tensor([math.inf, 0.0])
    loss_T = value_loss(new_T, garbage_T, garbage_T, torch.tensor([False, True]), clip=0.5)
    loss_T.sum().backward()
    assert loss_T.tolist() == [0.0, 0.5]
    assert new_T.grad.tolist() == [0.0, 1.0]


def test_bfloat16_values_are_compared_in_float32() -> None:
    """1 + 2^-10 is not a bfloat16 number, and a return need not be one."""
    new_T = torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)
    loss_T = value_loss(new_T, new_T.detach(), torch.tensor([1.0 + 2.0**-10], dtype=torch.float64), torch.tensor([True]), clip=0.5)
    assert loss_T.dtype == torch.float32
    assert loss_T.item() == 2.0**-21


@thorough
@given(st.integers(0, 2**32 - 1), st.sampled_from((None, 0.2, 0.5)))
def test_it_equals_the_loop_and_its_gradient_the_difference(seed: int, clip: float | None) -> None:
    rng, step = random.Random(seed), 1e-6
    new, old, target = ([rng.gauss(0, 1) for _ in range(TOKENS)] for _ in range(3))
    values, gradients = _loss(new, old, target, clip)
    for t in range(TOKENS):
        assert values[t] == pytest.approx(loops.value_loss(new[t], old[t], target[t], clip), rel=1e-12, abs=1e-15)
        around = [loops.value_loss(new[t] + d, old[t], target[t], clip) for d in (-step, 0.0, step)]
        left, right = (around[1] - around[0]) / step, (around[2] - around[1]) / step
        if abs(left - right) < 1e-4:  # away from the kinks
            assert gradients[t] == pytest.approx((left + right) / 2, abs=1e-5)
