"""The objective of a microbatch: values, gradients, what it measures, and that cutting it changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algo.objective import MAX_SUFFIX, policy_objective
from megatron_rpp.config.schema import Algo, KlLossName
from megatron_rpp.types import PackedBatch
from tests.reference.batches import packed
from tests.reference.estimators import clipped_loss

FULL = Algo(clip_low=0.2, clip_high=0.3, kl_loss_coef=0.7, entropy_coef=0.05, minibatches=2)


def _case(seed: int, tokens: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, PackedBatch, Tensor]:
    """(logp_new, entropy, batch, adv) with a mask that has holes and NaN in them."""
    generator = torch.Generator().manual_seed(seed)
    new_T, old_T, ref_T, adv_T = (torch.randn(tokens, generator=generator, dtype=torch.float64) * s for s in (0.3, 0.3, 0.3, 1.0))
    entropy_T = torch.rand(tokens, generator=generator, dtype=torch.float64)
    mask = [(torch.rand(tokens, generator=generator) < 0.7).tolist()]
    batch = packed(mask, [0.0], old=[old_T.tolist()], ref=[ref_T.tolist()], dtype=dtype)
    hidden = torch.where(batch.mask_T, 0.0, math.nan)
    return (new_T + hidden).to(dtype).requires_grad_(), (entropy_T + hidden).to(dtype), batch, adv_T + hidden


def test_the_loss_by_hand() -> None:
    """One token, new - old = log 1.5, adv 1, clip 0.2: -1.2. new - ref = 2, k2 = 2, unbiased, so times the ratio: 3.
    Entropy 0.5. loss = -1.2 + 0.1 * 3 - 0.01 * 0.5 = -0.905."""
    algo = Algo(kl_loss_coef=0.1, entropy_coef=0.01, minibatches=2)
    batch = packed([[1]], [0.0], old=[[-1.0 - math.log(1.5)]], ref=[[-3.0]])
    new_T = torch.tensor([-1.0], dtype=torch.float64)
    one_T = torch.ones(1, dtype=torch.float64)
    loss, num_tokens, metrics = policy_objective(new_T, one_T / 2, batch, one_T, algo)
    assert loss.item() == pytest.approx(-0.905, rel=1e-14)
    assert num_tokens.item() == 1
    expected = {
        "policy_loss": -1.2,
        "kl_loss": 3.0,
        "entropy": 0.5,
        "clip_frac_low": 0.0,
        "clip_frac_high": 1.0,
        "ratio": 1.5,
        "ratio_max": 1.5,
        "kl_k1": 2.0,
        "kl_k3": math.exp(-2) - 1 + 2,
        "kl_old_new": 1.5 - 1 - math.log(1.5),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-12)


def test_a_plain_kl_loss_has_no_ratio() -> None:
    batch = packed([[1]], [0.0], old=[[-1.0 - math.log(1.5)]], ref=[[-3.0]])
    new_T = torch.tensor([-1.0], dtype=torch.float64)
    _, _, metrics = policy_objective(new_T, None, batch, torch.ones(1, dtype=torch.float64), Algo(kl_loss_coef=0.1, kl_loss="k2"))
    assert metrics["kl_loss"].item() == pytest.approx(2.0)


def test_the_sum_and_the_denominator_follow_the_aggregation_and_the_metrics_do_not() -> None:
    """Responses of 3 and 1 tokens, new = old, adv 1 in the first and 5 in the second: losses -1 -1 -1 | -5. Weight 2 on the last."""
    rows = [[-1.0] * 3, [-1.0]]
    batch = replace(packed([[1, 1, 1], [1]], [0.0, 0.0], old=rows), weight_T=torch.tensor([1.0, 1.0, 1.0, 2.0]))
    adv_T = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    expected = {
        "token_mean": (-13.0, 4),
        "seq_mean_token_mean": (-1.0 - 10.0, 2),
        "seq_mean_token_sum": (-3.0 - 10.0, 2),
        "constant_length": (-13.0 / 8, 2),
    }
    for aggregate, (total, denominator) in expected.items():
        algo = Algo(aggregate=aggregate, aggregate_tokens=8)
        loss, count, metrics = policy_objective(batch.logp_old_T.clone(), None, batch, adv_T, algo)
        assert (loss.item(), count.item()) == (pytest.approx(total), denominator), aggregate
        assert metrics["policy_loss"].item() == -13.0


def test_a_dual_clip_has_a_metric_of_its_own() -> None:
    batch = packed([[1]], [0.0], old=[[-5.0]])
    arguments = torch.tensor([-1.0], dtype=torch.float64), None, batch, torch.tensor([-1.0], dtype=torch.float64)
    assert policy_objective(*arguments, Algo(dual_clip=3.0))[2]["clip_frac_dual"].item() == 1.0
    assert "clip_frac_dual" not in policy_objective(*arguments, Algo())[2]


@pytest.mark.parametrize("kl_loss", ["k2", "k2_unbiased"])
def test_the_gradient_equals_the_closed_form(kl_loss: KlLossName) -> None:
    """d/dnew = [-ratio * adv unless held] + lambda * w * (new - ref), w = ratio or 1, 0 outside the mask."""
    new_T, entropy_T, batch, adv_T = _case(3, tokens=40)
    algo = replace(FULL, kl_loss=kl_loss)
    policy_objective(new_T, entropy_T, batch, adv_T, algo)[0].backward()
    ratio_T = (new_T.detach() - batch.logp_old_T).exp()
    is_held_T = ((adv_T > 0) & (ratio_T > 1.3)) | ((adv_T < 0) & (ratio_T < 0.8))
    weight_T = ratio_T if kl_loss == "k2_unbiased" else 1.0
    expected_T = torch.where(is_held_T, 0.0, -ratio_T * adv_T) + 0.7 * weight_T * (new_T.detach() - batch.logp_ref_T)
    assert is_held_T.any()
    torch.testing.assert_close(new_T.grad, torch.where(batch.mask_T, expected_T, 0.0), rtol=1e-12, atol=1e-14)


def test_the_gradient_equals_finite_differences() -> None:
    """Of the package's own function, in float64, away from the bounds. With plain k2: tests/reference holds what k2_unbiased does."""
    new_T, entropy_T, batch, adv_T = _case(5, tokens=10)
    algo = replace(FULL, kl_loss="k2")
    entropy_T.requires_grad_()
    policy_objective(new_T, entropy_T, batch, adv_T, algo)[0].backward()
    step = 1e-6
    for name, x_T in (("new", new_T), ("entropy", entropy_T)):
        for t in batch.mask_T.nonzero().flatten().tolist():
            values = []
            for sign in (1, -1):
                moved_T = x_T.detach().clone()
                moved_T[t] += sign * step
                arguments = (moved_T, entropy_T.detach()) if name == "new" else (new_T.detach(), moved_T)
                values.append(policy_objective(*arguments, batch, adv_T, algo)[0].item())
            assert x_T.grad[t].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6, abs=1e-8), (name, t)


def test_the_policy_loss_equals_the_loop() -> None:
    new_T, _, batch, adv_T = _case(7, tokens=50)
    _, num_tokens, metrics = policy_objective(new_T, None, batch, adv_T, replace(FULL, entropy_coef=0.0))
    tokens = [t for t, flag in enumerate(batch.mask_T.tolist()) if flag]
    losses = [clipped_loss(new_T[t].item(), batch.logp_old_T[t].item(), adv_T[t].item(), low=0.2, high=0.3) for t in tokens]
    assert metrics["policy_loss"].item() == pytest.approx(math.fsum(losses), rel=1e-12)
    assert num_tokens.item() == len(tokens)


def _slice(case: tuple[Tensor, Tensor, PackedBatch, Tensor], a: int, b: int) -> tuple[Tensor, Tensor, PackedBatch, Tensor]:
    new_T, entropy_T, batch, adv_T = case
    part = replace(
        batch,
        tokens_T=batch.tokens_T[a:b],
        cu_len_S1=torch.tensor([0, b - a], dtype=torch.int32),
        mask_T=batch.mask_T[a:b],
        logp_rollout_T=batch.logp_rollout_T[a:b],
        logp_old_T=batch.logp_old_T[a:b],
        logp_ref_T=batch.logp_ref_T[a:b],
    )
    return new_T[a:b], entropy_T[a:b], part, adv_T[a:b]


@pytest.mark.parametrize("cuts", [(0, 30), (0, 1, 30), (0, 11, 11, 25, 30)])
def test_cutting_a_microbatch_changes_neither_gradient_nor_metrics(cuts: tuple[int, ...]) -> None:
    """The parts are summed and divided once by all tokens, as Megatron does; one part is empty."""
    whole = _case(9, tokens=30)
    loss, num_tokens, metrics = policy_objective(*whole, FULL)
    (loss / num_tokens).backward()
    expected_T, whole[0].grad = whole[0].grad, None

    parts = [policy_objective(*_slice(whole, a, b), FULL) for a, b in pairwise(cuts)]
    assert sum(part[1] for part in parts) == num_tokens
    (sum(part[0] for part in parts) / num_tokens).backward()
    torch.testing.assert_close(whole[0].grad, expected_T, rtol=1e-13, atol=1e-16)
    for name, value in metrics.items():
        values = torch.stack([part[2][name] for part in parts])
        got = values.max() if name.endswith(MAX_SUFFIX) else values.sum()
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-15)


def test_a_microbatch_without_a_token_has_a_gradient_of_zero() -> None:
    """A rank with nothing to train still takes part in the backward pass."""
    new_T = torch.tensor([-1.0, math.nan], requires_grad=True)
    batch = packed([[0, 0]], [0.0], old=[[0.0, 0.0]], ref=[[0.0, 0.0]], dtype=torch.float32)
    loss, num_tokens, metrics = policy_objective(new_T, torch.zeros(2), batch, torch.zeros(2), FULL)
    loss.backward()
    assert (loss.item(), num_tokens.item(), new_T.grad.tolist()) == (0.0, 0, [0.0, 0.0])
    assert set(metrics) == set(policy_objective(*_case(1), FULL)[2])
    assert all(value.item() == 0.0 for value in metrics.values())


def test_on_policy_the_loss_is_minus_the_sum_of_advantages_and_the_gradient_is_reinforce() -> None:
    """new = old: ratio 1, nothing held, d/dnew = -adv."""
    _, _, batch, adv_T = _case(13)
    new_T = batch.logp_old_T.clone().requires_grad_()
    loss, _, metrics = policy_objective(new_T, None, batch, adv_T, Algo())
    loss.backward()
    trained_T = torch.where(batch.mask_T, adv_T, 0.0)
    assert loss.item() == pytest.approx(-trained_T.sum().item(), rel=1e-14)
    torch.testing.assert_close(new_T.grad, -trained_T)
    assert metrics["kl_old_new"].item() == 0.0
    assert metrics["clip_frac_low"].item() == metrics["clip_frac_high"].item() == 0.0


def test_float32_and_bfloat16_come_close_to_float64() -> None:
    exact = policy_objective(*_case(15, tokens=60), FULL)
    single = policy_objective(*_case(15, tokens=60, dtype=torch.float32), FULL)
    assert single[0].dtype == torch.float32
    assert single[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    half_new_T, half_entropy_T, half_batch, adv_T = _case(15, tokens=60, dtype=torch.bfloat16)
    upcast = policy_objective(half_new_T.float(), half_entropy_T.float(), half_batch, adv_T, FULL)
    assert policy_objective(half_new_T, half_entropy_T.float(), half_batch, adv_T, FULL)[0].item() == upcast[0].item()


@pytest.mark.parametrize(
    ("algo", "lacks", "message"),
    [
        (Algo(kl_loss_coef=0.1), {"logp_ref_T": None}, "logp_ref_T"),
        (Algo(), {"logp_old_T": None}, "logp_old_T"),
        (Algo(entropy_coef=0.1), {}, "entropy_T"),
    ],
)
def test_a_term_without_its_input_is_refused(algo: Algo, lacks: dict[str, Any], message: str) -> None:
    new_T, _, batch, adv_T = _case(1)
    with pytest.raises(ValueError, match=message):
        policy_objective(new_T, None, replace(batch, **lacks), adv_T, algo)


def test_a_reference_that_forbids_a_token_does_no_harm_while_it_is_only_watched() -> None:
    """ref = -inf gives an infinite k2; with a coefficient of 0 the loss stays finite."""
    batch = packed([[1]], [0.0], old=[[-1.0]], ref=[[-math.inf]])
    new_T = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss, _, _ = policy_objective(new_T, None, batch, torch.ones(1, dtype=torch.float64), Algo())
    loss.backward()
    assert (loss.item(), new_T.grad.item()) == (-1.0, -1.0)
