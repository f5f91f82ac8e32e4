"""Per-token estimates of a Kullback-Leibler divergence from one sampled token each.

Let x_T = logp_a_T - logp_b_T, with the token sampled from a. All three have no expectation inside: they are functions of
the sample. Under a, E[k1] = E[k3] = KL(a || b), while E[k2] differs from it at third order in x. They differ in what their
gradient means, which is why each has its one place here:

    k1 in the reward (detached)   right: the policy gradient of E[return] then holds the gradient of -KL
    k2 in the loss                right: E_a[grad k2] = grad KL(a || b)      (k1 in the loss has zero expected gradient)
    k3 in the metrics             never negative and of low variance; as a loss it would follow KL(b || a) instead

Source: Schulman, "Approximating KL divergence" (2020); placement as REINFORCE++ arXiv 2501.03262 Eq. 4 and App. B.1.
Differs from OpenRLHF, verl and AReaL: nothing is clamped, because beyond a clamp the gradient is exactly 0 and a token that
drifted far would no longer be pulled back.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logp_a_T: Tensor, logp_b_T: Tensor) -> Tensor:
    """x.  Shapes: any, equal -> the same. Units: nats."""
    return logp_a_T - logp_b_T


def k2(logp_a_T: Tensor, logp_b_T: Tensor) -> Tensor:
    """x^2 / 2.  Shapes: any, equal -> the same. Units: nats."""
    return 0.5 * (logp_a_T - logp_b_T).square()


def k3(logp_a_T: Tensor, logp_b_T: Tensor) -> Tensor:
    """exp(-x) - 1 + x, without the cancellation of the first two terms near x = 0.  Shapes: any, equal -> the same. Units: nats."""
    x = logp_a_T - logp_b_T
    return torch.expm1(-x) + x


def adapted_coef(coef: float, *, kl: float, target: float, num_samples: int, horizon: int) -> float:
    """The KL coefficient for the next step: up when the policy is farther from the reference than `target`, else down.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)
    Units: kl and target in nats for a token, estimated in the same way; num_samples and horizon in responses.
    Source: Ziegler et al. arXiv 1909.08593 section 2.2; the same in OpenRLHF and verl.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * num_samples / horizon)
