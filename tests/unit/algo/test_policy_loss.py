"""The clipped surrogate and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algo.policy_loss import ClippedLoss, log_ratio, ppo_clip
from tests.reference.estimators import clipped_loss
from tests.reference.properties import steady


def _clip(ratio: float, adv: float, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> tuple[ClippedLoss, float]:
    new_T = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero_T, one_T = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    clipped = ppo_clip(new_T, zero_T, torch.tensor([adv], dtype=torch.float64), one_T, clip_low=low, clip_high=high, dual_clip=dual)
    clipped.loss_T.sum().backward()
    return clipped, new_T.grad.item()


@pytest.mark.parametrize(
    ("ratio", "adv", "low", "high", "dual", "loss", "gradient"),
    [
        (1.5, 1.0, 0.2, 0.2, None, -1.2, 0.0),  # held at 1 + 0.2
        (1.5, 1.0, 0.2, 0.28, None, -1.28, 0.0),  # the upper bound is its own
        (0.5, 1.0, 0.2, 0.2, None, -0.5, -0.5),  # below, but the advantage asks for more: not held
        (1.5, -1.0, 0.2, 0.2, None, 1.5, 1.5),  # above, but the advantage asks for less: not held
        (0.5, -1.0, 0.2, 0.2, None, 0.8, 0.0),  # held at 1 - 0.2
        (0.5, -1.0, 0.6, 0.2, None, 0.5, 0.5),  # the lower bound is its own
        (5.0, -1.0, 0.2, 0.2, 3.0, 3.0, 0.0),  # held at c
        (5.0, 1.0, 0.2, 0.2, 3.0, -1.2, 0.0),  # c is for negative advantages only
        (1.0, 2.0, 0.2, 0.2, None, -2.0, -2.0),
        (7.0, 0.0, 0.2, 0.2, 3.0, 0.0, 0.0),
    ],
)
def test_loss_and_gradient_case_by_case(
    ratio: float, adv: float, low: float, high: float, dual: float | None, loss: float, gradient: float
) -> None:
    clipped, got = _clip(ratio, adv, low, high, dual)
    assert clipped.loss_T.item() == pytest.approx(loss, rel=1e-14, abs=1e-300)
    assert got == pytest.approx(gradient, rel=1e-14, abs=1e-300)


@steady
@given(st.floats(0.01, 20), st.floats(-3, 3), st.floats(0, 0.9), st.floats(0, 2), st.sampled_from([None, 1.5, 3.0, 10.0]))
def test_the_loss_equals_the_papers_min(ratio: float, adv: float, low: float, high: float, dual: float | None) -> None:
    if dual is not None and dual <= 1 + high:
        dual = None
    clipped, _ = _clip(ratio, adv, low, high, dual)
    expected = clipped_loss(math.log(ratio), 0.0, adv, low=low, high=high, dual=dual)
    assert clipped.loss_T.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_masks_say_which_bound_held_a_token() -> None:
    cases = [(1.5, 1.0), (0.5, -1.0), (1.5, -1.0), (0.5, 1.0), (5.0, -1.0)]
    seen = [_clip(ratio, adv, dual=3.0)[0] for ratio, adv in cases]
    assert [c.is_clipped_high_T.item() for c in seen] == [True, False, False, False, False]
    assert [c.is_clipped_low_T.item() for c in seen] == [False, True, False, False, False]
    assert [c.is_clipped_dual_T.item() for c in seen] == [False, False, False, False, True]


def test_a_ratio_on_its_bound_still_has_its_gradient() -> None:
    """1.25 is exact and so is exp(log 1.25) here or one bit off; the test is at clip_high = ratio - 1 as computed."""
    new_T = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    bound = new_T.detach().exp().item() - 1
    ones_T = torch.ones(1, dtype=torch.float64)
    ppo_clip(new_T, 0 * ones_T, ones_T, ones_T.bool(), clip_low=0.2, clip_high=bound).loss_T.sum().backward()
    assert new_T.grad.item() == pytest.approx(-math.exp(0.25))


def test_a_runaway_ratio_is_finite_and_bounded() -> None:
    """exp(100) overflows float32; the exponent is held at 20."""
    new_T, old_T = torch.tensor([0.0, -100.0]), torch.tensor([-100.0, 0.0])
    clipped = ppo_clip(new_T, old_T, torch.tensor([-1.0, 1.0]), torch.ones(2, dtype=torch.bool), clip_low=0.2, clip_high=0.2)
    assert clipped.ratio_T.tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-5)
    assert log_ratio(new_T, old_T, torch.ones(2, dtype=torch.bool)).tolist() == [20.0, -20.0]


def test_outside_the_mask_everything_is_zero_and_nothing_is_read() -> None:
    nan_T = torch.tensor([math.nan, -1.0], dtype=torch.float64)
    new_T = torch.tensor([math.nan, -1.0], dtype=torch.float64, requires_grad=True)
    clipped = ppo_clip(new_T, nan_T, nan_T.neg(), torch.tensor([False, True]), clip_low=0.2, clip_high=0.2)
    clipped.loss_T.sum().backward()
    assert clipped.loss_T.tolist() == [0.0, -1.0]
    assert clipped.ratio_T.tolist() == [0.0, 1.0]
    assert new_T.grad.tolist() == [0.0, -1.0]


def test_bfloat16_is_upcast_and_float64_is_kept() -> None:
    def dtype_of(dtype: torch.dtype) -> torch.dtype:
        x_T: Tensor = torch.zeros(1, dtype=dtype)
        one_T = torch.ones(1, dtype=torch.float64)
        return ppo_clip(x_T, x_T, one_T, one_T.bool(), clip_low=0.2, clip_high=0.2).loss_T.dtype

    assert dtype_of(torch.bfloat16) == torch.float32
    assert dtype_of(torch.float32) == torch.float32
    assert dtype_of(torch.float64) == torch.float64
