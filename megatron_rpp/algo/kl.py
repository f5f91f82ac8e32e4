"""Per-token estimates of a Kullback-Leibler divergence from one sampled token each, in the reward and in the loss.

Let x_T = logp_a_T - logp_b_T, with the token sampled from a. k1 = x, k2 = x^2 / 2 and k3 = exp(-x) - 1 + x are functions of
the sample, with no expectation inside. Under a, E[k1] = E[k3] = KL(a || b), while E[k2] differs from it at third order in x.

In the reward (detached) k1 is right: the policy gradient of E[return] then holds the gradient of -KL. k2 and k3 there are the
gradient of no divergence, and being positive they lower the advantage of every token before them.

In the loss the estimate is differentiated, and what counts is the expected gradient. With a = new, b = ref, and tokens of old:

    k1            nothing for new = old: E[grad logp] = 0; off-policy away from old, whatever the reference says
    k2            grad KL(new || ref) for new = old; off-policy the tokens of old are counted as if new had sampled them
    k3            grad KL(ref || new), the other direction, for new = old; a wrong mixture off-policy (GRPO as published)
    k1_unbiased   ratio * k1, ratio differentiated:  grad KL(new || ref), for any old
    k2_unbiased   ratio * k2, ratio held:            grad KL(new || ref), for any old
    k3_unbiased   ratio * k3, ratio differentiated:  grad KL(new || ref), for any old; the least noise in its value

with ratio = new / old of the token. "Expected" is over the token given what stands before it; which prefixes come up is
old's doing, as everywhere in PPO, and what a token does to the divergence of later ones is in the reward form alone. Tests
enumerate a softmax to prove each line.

Source: Schulman, "Approximating KL divergence" (2020); placement as REINFORCE++ arXiv 2501.03262 Eq. 4 and App. B.1; k3 as a
loss GRPO arXiv 2402.03300 Eq. 4; ratio * k3 DeepSeek-V3.2 arXiv 2512.02556 and slime's use_unbiased_kl.
Differs from OpenRLHF, verl and AReaL: no estimate is clamped, because beyond a clamp the gradient is exactly 0 and a token that
drifted far would no longer be pulled back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rpp.config.schema import KlLossName, KlName


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


ESTIMATES: dict[KlName, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_loss(name: KlLossName, logp_new_T: Tensor, logp_ref_T: Tensor, log_ratio_T: Tensor) -> Tensor:
    """What kl_loss_coef times is added to a token's loss; the table above says what each name's gradient follows.

    log_ratio_T: logp_new - logp_old with its gradient, held to what exp can bear (policy_loss.log_ratio). Plain names do not
    look at it. It is the token's own ratio, whatever ratio the policy loss uses.
    Shapes: [T] each -> [T]. Units: nats.
    """
    plain, _, unbiased = name.partition("_")
    estimate_T = ESTIMATES[plain](logp_new_T, logp_ref_T)
    if not unbiased:
        return estimate_T
    ratio_T = log_ratio_T.exp()
    return (ratio_T.detach() if plain == "k2" else ratio_T) * estimate_T


def adapted_coef(coef: float, *, kl: float, target: float, num_samples: int, horizon: int) -> float:
    """The KL coefficient for the next step: up when the policy is farther from the reference than `target`, else down.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * min(num_samples / horizon, 1))
    Units: kl and target in nats for a token, estimated in the same way; num_samples and horizon in responses.
    Source: Ziegler et al. arXiv 1909.08593 section 2.2; the same in OpenRLHF and verl.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * min(num_samples / horizon, 1.0))  # a batch larger than the horizon must not turn the sign
