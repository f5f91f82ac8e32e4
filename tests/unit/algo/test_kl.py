"""The three estimators, their gradients, and the controller."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rpp.algo.kl import adapted_coef, k1, k2, k3


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


@pytest.mark.parametrize(("kl", "error"), [(0.05, -0.2), (0.1, 0.0), (0.11, 0.1), (9.0, 0.2)])
def test_the_coefficient_follows_the_distance_by_at_most_a_fifth(kl: float, error: float) -> None:
    """0.05 is half the target: error -0.5, held at -0.2. 0.11 is a tenth above it: error 0.1. 1024 / 10000 = 0.1024."""
    got = adapted_coef(0.2, kl=kl, target=0.1, num_samples=1024, horizon=10000)
    assert got == pytest.approx(0.2 * (1 + error * 0.1024), rel=1e-14)
