"""Each policy loss of a token, and its gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algo.policy_loss import MAX_LOG_RATIO, TokenLoss, cispo, gspo, log_ratio, policy_loss, ppo_clip, reinforce
from megatron_rpp.config.schema import Algo, LossName
from tests.reference import losses as loops
from tests.reference.drawn import draw, microbatch
from tests.reference.estimators import clipped_loss
from tests.reference.properties import steady, thorough


def _clip(ratio: float, adv: float, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> tuple[TokenLoss, float]:
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


@thorough
@given(st.integers(0, 2**32 - 1), st.floats(1.01, 10.0))
def test_a_dual_clip_bounds_the_loss_of_a_bad_token_and_only_that(seed: int, dual: float) -> None:
    """Without it the loss of a negative advantage grows with the ratio without bound; with it, to c * |A| and no gradient beyond."""
    generator = torch.Generator().manual_seed(seed)
    new_T, adv_T = torch.randn(2, 16, generator=generator, dtype=torch.float64).mul(3)
    new_T.requires_grad_()
    ones_T = torch.ones(16, dtype=torch.bool)
    bounds = dict(clip_low=0.2, clip_high=0.2)
    free = ppo_clip(new_T, torch.zeros(16), adv_T, ones_T, **bounds)
    held = ppo_clip(new_T, torch.zeros(16), adv_T, ones_T, dual_clip=dual, **bounds)
    held.loss_T.sum().backward()
    is_bad_T = adv_T < 0
    assert (held.loss_T <= torch.where(is_bad_T, dual * adv_T.abs() * (1 + 1e-12), torch.inf)).all()
    assert torch.equal(held.loss_T, torch.where(held.is_clipped_dual_T, dual * adv_T.abs(), free.loss_T))
    assert torch.equal(held.is_clipped_dual_T, is_bad_T & (new_T.exp() > dual))
    assert (new_T.grad[held.is_clipped_dual_T] == 0.0).all()


# ---- GSPO ----


def _gspo(rows: list[list[tuple[float, float]]], low: float, high: float) -> tuple[TokenLoss, list[float]]:
    """Of (log ratio, advantage) by token; its gradient beside it."""
    new_T, adv_T = (torch.tensor([token[k] for row in rows for token in row], dtype=torch.float64) for k in (0, 1))
    cu_len_S1 = torch.tensor([0, *[len(row) for row in rows]]).cumsum(0)
    new_T.requires_grad_()
    mask_T = torch.ones_like(new_T, dtype=torch.bool)
    found = gspo(new_T, torch.zeros_like(adv_T), adv_T, mask_T, cu_len_S1=cu_len_S1, clip_low=low, clip_high=high)
    found.loss_T.sum().backward()
    return found, new_T.grad.tolist()


def test_a_response_has_one_ratio_and_is_clipped_as_a_whole() -> None:
    """Log ratios 0.3 and -0.1 have the mean 0.1: held at 1.05 for A = 1, though one token fell. -0.2 alone, A = -1: free at 0.6."""
    found, gradient = _gspo([[(0.3, 1.0), (-0.1, 1.0)], [(-0.2, -1.0)]], 0.4, 0.05)
    s, r = math.exp(0.1), math.exp(-0.2)
    assert found.ratio_T.tolist() == pytest.approx([s, s, r], rel=1e-14)
    assert found.loss_T.tolist() == pytest.approx([-1.05, -1.05, r], rel=1e-14)
    assert found.is_clipped_high_T.tolist() == [True, True, False]
    assert gradient == pytest.approx([0.0, 0.0, r], rel=1e-14)


def test_where_the_advantage_differs_by_token_each_keeps_its_own() -> None:
    """Token form: gradient -s * A_t at token t, with s = exp((0.2 + 0) / 2)."""
    _, gradient = _gspo([[(0.2, 2.0), (0.0, -1.0)]], 0.5, 0.5)
    assert gradient == pytest.approx([-2 * math.exp(0.1), math.exp(0.1)], rel=1e-14)


def test_the_bounds_of_a_token_ratio_never_hold_a_response() -> None:
    """Every token 10 % more likely, in turn less: a token would be held at 1.05, the response of 2000 has a ratio of 1."""
    found, gradient = _gspo([[(0.1 if t % 2 else -0.1, 1.0) for t in range(2000)]], 0.05, 0.05)
    assert found.ratio_T.unique().tolist() == pytest.approx([1.0], abs=1e-12)
    assert not found.is_clipped_high_T.any()
    assert min(map(abs, gradient)) > 0.9


@thorough
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_the_token_form_of_gspo_is_its_sequence_form_where_a_response_has_one_advantage(seed: int, lengths: list[int]) -> None:
    """The paper's objective differentiated as it stands, mean over responses, against ours under seq_mean_token_mean."""
    algo = Algo(loss="gspo", clip_low=0.1, clip_high=0.12, aggregate="seq_mean_token_mean")
    responses = draw(seed, lengths, masked=1.0, has_one_adv=True)
    new_T, _, batch, adv_T = microbatch(responses)
    found = policy_loss(new_T, replace(batch, weight_T=None), adv_T, algo)
    length_T = torch.repeat_interleave(batch.cu_len_S1.diff(), batch.cu_len_S1.diff()).double()
    (found.loss_T / length_T).sum().backward()
    assert (found.loss_T / length_T).sum().item() == pytest.approx(math.fsum(loops.sequence_form(r, algo) for r in responses), rel=1e-11)
    is_clipped_T = found.is_clipped_low_T | found.is_clipped_high_T
    expected_T = torch.where(is_clipped_T, 0.0, -adv_T * found.ratio_T / length_T)
    torch.testing.assert_close(new_T.grad, expected_T, rtol=1e-12, atol=1e-15)
    if loops.is_near_a_kink(responses, algo):
        return
    for response, start in zip(responses, batch.cu_len_S1.tolist(), strict=False):
        moved = [[replace(response[0], new=response[0].new + step), *response[1:]] for step in (1e-6, -1e-6)]
        slope = (loops.sequence_form(moved[0], algo) - loops.sequence_form(moved[1], algo)) / 2e-6
        assert new_T.grad[start].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@thorough
@given(st.integers(0, 2**32 - 1))
def test_gspo_of_responses_of_one_token_is_ppo_clip(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new_T, old_T, adv_T = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    mask_T = torch.rand(12, generator=generator) < 0.7
    bounds, gradients, found = dict(clip_low=0.3, clip_high=0.5), [], []
    for function, extra in ((ppo_clip, {}), (gspo, {"cu_len_S1": torch.arange(13)})):
        leaf_T = new_T.clone().requires_grad_()
        found.append(function(leaf_T, old_T, adv_T, mask_T, **bounds, **extra))
        found[-1].loss_T.sum().backward()
        gradients.append(leaf_T.grad)
    assert torch.equal(found[0].is_clipped_low_T, found[1].is_clipped_low_T)
    torch.testing.assert_close(found[0].loss_T, found[1].loss_T, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-14, atol=0)


def test_a_response_with_a_token_that_became_impossible_is_small_and_finite() -> None:
    found, gradient = _gspo([[(-math.inf, -1.0), (0.0, -1.0)]], 0.2, 0.2)
    assert found.ratio_T.tolist() == pytest.approx([math.exp(-MAX_LOG_RATIO / 2)] * 2)
    assert gradient == [0.0, 0.0]


# ---- CISPO and REINFORCE ----


def test_cispo_by_hand() -> None:
    """Ratio e^0.5 held at 1.3: loss -1.3 * 2 * logp; ratio e^-2 below 1 - 0.2: 0.8; with clip_low 1 it is free."""
    new_T = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    old_T, adv_T = torch.tensor([-1.5, -1.0], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)
    ones_T = torch.ones(2, dtype=torch.bool)
    held = cispo(new_T, old_T, adv_T, ones_T, clip_low=0.2, clip_high=0.3)
    assert held.loss_T.tolist() == pytest.approx([1.3 * 2, 0.8 * 2 * 3], rel=1e-14)
    assert (held.is_clipped_high_T.tolist(), held.is_clipped_low_T.tolist()) == ([True, False], [False, True])
    free = cispo(new_T, old_T, adv_T, ones_T, clip_low=1.0, clip_high=0.3)
    free.loss_T.sum().backward()
    assert new_T.grad.tolist() == pytest.approx([-1.3 * 2, -math.exp(-2) * 2], rel=1e-14)
    assert not free.is_clipped_low_T.any()


@thorough
@given(st.integers(0, 2**32 - 1), st.sampled_from((0.1, 0.2, 1.0)), st.sampled_from((0.1, 4.0)))
def test_cispo_never_takes_a_tokens_gradient_away(seed: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    new_T, old_T, adv_T = torch.randn(3, 12, generator=generator, dtype=torch.float64).mul(8)
    mask_T = torch.rand(12, generator=generator) < 0.7
    new_T.requires_grad_()
    cispo(new_T, old_T, adv_T, mask_T, clip_low=low, clip_high=high).loss_T.sum().backward()
    assert torch.equal(new_T.grad != 0, mask_T)
    assert torch.equal(new_T.grad.sign()[mask_T], -adv_T.sign()[mask_T])
    assert (new_T.grad.abs() <= adv_T.abs() * (1 + high)).all()


def test_reinforce_is_the_policy_gradient_whatever_the_ratio() -> None:
    new_T = torch.tensor([-1.0, -2.0, math.nan], dtype=torch.float64, requires_grad=True)
    adv_T = torch.tensor([3.0, -1.0, math.nan], dtype=torch.float64)
    found = reinforce(new_T, torch.tensor([-9.0, 0.0, math.nan]), adv_T, torch.tensor([True, True, False]))
    found.loss_T.sum().backward()
    assert found.loss_T.tolist() == [3.0, -2.0, 0.0]
    assert new_T.grad.tolist() == [-3.0, 1.0, 0.0]
    assert found.ratio_T.tolist() == pytest.approx([math.exp(8), math.exp(-2), 0.0])


def test_on_policy_all_losses_have_one_gradient() -> None:
    responses = [[replace(token, new=token.old) for token in response] for response in draw(3, (4, 2), has_one_adv=True)]
    gradients = []
    for loss in get_args(LossName):
        new_T, _, batch, adv_T = microbatch(responses)
        policy_loss(new_T, batch, adv_T, Algo(loss=loss)).loss_T.sum().backward()
        gradients.append(new_T.grad)
    weighted_T = torch.where(batch.mask_T, -adv_T * batch.weight_T, 0.0)
    assert all(torch.allclose(gradient, weighted_T, rtol=1e-14, atol=0) for gradient in gradients)


@pytest.mark.parametrize("loss", ["gspo", "cispo", "reinforce"])
def test_a_dual_clip_is_refused_where_it_means_nothing(loss: LossName) -> None:
    """verl's gspo takes clip_ratio_c and ignores it."""
    new_T, _, batch, adv_T = microbatch(draw(0, (2,)))
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(new_T, batch, adv_T, Algo(loss=loss, dual_clip=3.0))


# ---- all ----


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
