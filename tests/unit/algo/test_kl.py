"""The three estimators, their gradients, and the controller."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algo.kl import adapted_coef, k1, k2, k3, kl_loss
from megatron_rpp.config.schema import KlLossName
from tests.reference.properties import thorough


def test_the_estimators_at_a_distance_of_one_nat() -> None:
    """x = -0.5 - (-1.5) = 1: k1 = 1, k2 = 1/2, k3 = e^-1 - 1 + 1 = 0.36787944117144233."""
    a, b = torch.tensor([-0.5], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    assert k1(a, b).item() == 1.0
    assert k2(a, b).item() == 0.5
    assert k3(a, b).item() == pytest.approx(math.exp(-1), abs=1e-16)


def test_k3_keeps_its_digits_near_zero() -> None:
    """k3 = x^2/2 - x^3/6 + ...; at x = 1e-6 that is 5e-13, which exp(-x) - 1 + x computed term by term in float64 misses by 1e-4."""
    x = torch.tensor([1e-6], dtype=torch.float64)
    assert k3(x, torch.zeros_like(x)).item() == pytest.approx(5e-13 - 1e-18 / 6, rel=1e-9, abs=0)


def _policy() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    return logits, logp, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()


def test_in_the_loss_k2_pulls_along_the_reverse_kl_and_k1_nowhere_and_k3_along_the_forward_kl() -> None:
    """E_pi[grad k2] = grad KL(pi || ref); E_pi[grad k1] = E_pi[grad logp] = 0; E_pi[grad k3] = pi - ref = grad KL(ref || pi)."""
    logits, logp, logp_ref = _policy()
    pi = logp.exp().detach()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    reverse = gradient((logp.exp() * (logp - logp_ref)).sum())
    torch.testing.assert_close(gradient((pi * k2(logp, logp_ref)).sum()), reverse, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient((pi * k1(logp, logp_ref)).sum()), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient((pi * k3(logp, logp_ref)).sum()), pi - logp_ref.exp(), rtol=1e-12, atol=1e-15)


def test_k1_and_k3_are_unbiased() -> None:
    _, logp, logp_ref = _policy()
    pi, kl = logp.exp(), (logp.exp() * (logp - logp_ref)).sum()
    torch.testing.assert_close((pi * k1(logp, logp_ref)).sum(), kl)
    torch.testing.assert_close((pi * k3(logp, logp_ref)).sum(), kl)


# ---- as a loss: the expected gradient by enumeration of every token ----


def _expected_gradient(name: KlLossName, theta: Tensor, logp_old: Tensor, logp_ref: Tensor) -> Tensor:
    """sum over tokens of old(token) * grad of kl_loss(token), in the logits of new."""
    logp_new = theta.log_softmax(-1)
    value = (logp_old.exp() * kl_loss(name, logp_new, logp_ref, logp_new - logp_old)).sum()
    return torch.autograd.grad(value, theta)[0]


def _grad_kl(theta: Tensor, logp_ref: Tensor) -> Tensor:
    logp_new = theta.log_softmax(-1)
    return torch.autograd.grad((logp_new.exp() * (logp_new - logp_ref)).sum(), theta)[0]


def _three(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of new, log-probabilities of old and of ref, over three tokens."""
    draws = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws[0].requires_grad_(), draws[1].log_softmax(0), draws[2].log_softmax(0)


@thorough
@given(st.integers(0, 2**32 - 1))
def test_the_unbiased_forms_pull_along_the_reverse_kl_whichever_policy_sampled(seed: int) -> None:
    theta, logp_old, logp_ref = _three(seed)
    wanted = _grad_kl(theta, logp_ref)
    for name in ("k1_unbiased", "k2_unbiased", "k3_unbiased"):
        torch.testing.assert_close(_expected_gradient(name, theta, logp_old, logp_ref), wanted, rtol=1e-9, atol=1e-12)


def test_off_policy_the_plain_forms_pull_elsewhere() -> None:
    """On the logits of kl-03 with another policy's tokens. Plain k1 pushes away from old: E_old[grad logp_new] = old - new."""
    theta, logp, logp_ref = _policy()
    logp_old = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    wanted = _grad_kl(theta, logp_ref)
    for name in ("k1", "k2", "k3"):
        assert (_expected_gradient(name, theta, logp_old, logp_ref) - wanted).abs().max() > 0.03, name
    torch.testing.assert_close(_expected_gradient("k1", theta, logp_old, logp_ref), logp_old.exp() - logp.exp().detach())


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_plain_forms_leave_the_ratio_out(name: KlLossName) -> None:
    a, b = torch.tensor([-0.5, -2.0]), torch.tensor([-1.5, -1.0])
    assert torch.equal(kl_loss(name, a, b, torch.tensor([math.nan, 7.0])), {"k1": k1, "k2": k2, "k3": k3}[name](a, b))


def test_the_ratio_of_k2_is_held_and_that_of_k1_and_k3_is_not() -> None:
    """At x = 0 nothing pulls, but for k1, whose value has no minimum: its gradient there is the ratio, 2."""
    for name, gradient in (("k1_unbiased", 2.0), ("k2_unbiased", 0.0), ("k3_unbiased", 0.0)):
        new = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        kl_loss(name, new, new.detach(), new - (new.detach() - math.log(2))).sum().backward()
        assert new.grad.item() == pytest.approx(gradient, abs=1e-15), name
    new = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    kl_loss("k2_unbiased", new, new.detach() - 0.5, new - (new.detach() - math.log(2))).sum().backward()
    assert new.grad.item() == pytest.approx(2 * 0.5)  # and not 2 * (0.5 + 0.5^2 / 2)


def test_over_two_steps_only_the_reward_form_counts_what_a_token_does_to_the_divergence_of_later_ones() -> None:
    """Two tokens, the second one's policy depends on the first; every pair is enumerated. k1 in the reward, as a reward-to-go,
    has the gradient of the KL of the pair; k2 of each token lacks E[grad logp(first) * KL(second | first)]."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    after = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.2], [-0.7, 0.3, 0.9]], dtype=torch.float64)
    first, second = theta.log_softmax(0), (theta + after).log_softmax(1)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    pair = (first[:, None] + second).exp()
    x_first, x_second = k1(first, ref)[:, None], k1(second, ref)
    whole = gradient((pair * (x_first + x_second)).sum())
    to_go = (x_first + x_second).detach() * first[:, None] + x_second.detach() * second
    torch.testing.assert_close(gradient((pair.detach() * to_go).sum()), whole, rtol=1e-12, atol=1e-15)
    by_token = gradient((pair.detach() * (k2(first, ref)[:, None] + k2(second, ref))).sum())
    future = gradient((first.exp() * (second.exp() * x_second).sum(1).detach()).sum())
    assert future.abs().max() > 0.01
    torch.testing.assert_close(by_token + future, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("kl", "error"), [(0.05, -0.2), (0.1, 0.0), (0.11, 0.1), (9.0, 0.2)])
def test_the_coefficient_follows_the_distance_by_at_most_a_fifth(kl: float, error: float) -> None:
    """0.05 is half the target: error -0.5, held at -0.2. 0.11 is a tenth above it: error 0.1. 1024 / 10000 = 0.1024."""
    got = adapted_coef(0.2, kl=kl, target=0.1, num_samples=1024, horizon=10000)
    assert got == pytest.approx(0.2 * (1 + error * 0.1024), rel=1e-14)


def test_a_batch_beyond_the_horizon_moves_the_coefficient_no_farther_than_a_whole_one() -> None:
    assert adapted_coef(0.04, kl=0.0, target=0.1, num_samples=8192, horizon=1000) == pytest.approx(0.04 * 0.8)
    assert adapted_coef(0.04, kl=9.0, target=0.1, num_samples=8192, horizon=1000) == pytest.approx(0.04 * 1.2)
