"""The training objective of one microbatch: what is summed, what it is divided by, and what is measured on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algo.aggregate import aggregate, on_mask
from megatron_rpp.algo.kl import k1, k3, kl_loss
from megatron_rpp.algo.policy_loss import TokenLoss, at_least_float32, log_ratio, policy_loss
from megatron_rpp.config.schema import Algo
from megatron_rpp.types import PackedBatch

# Metrics whose name ends so are reduced by maximum. All others are sums over masked tokens: add, then divide by the tokens.
MAX_SUFFIX = "_max"


def policy_objective(
    logp_new_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch, adv_T: Tensor, algo: Algo
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """This microbatch's summand of the loss, of its denominator, and sums of metrics over its masked tokens.

    loss[t] = weight[t] * policy_loss[t] + kl_loss_coef * kl_loss[t] - entropy_coef * entropy[t]
    returned: sum_t share[t] * loss[t] and the denominator, both by algo.aggregate (algo/aggregate.py); policy_loss by algo.loss
    (algo/policy_loss.py), kl_loss by algo.kl_loss (algo/kl.py), weight by the roll-out correction (1 where batch.weight_T is None)

    Nothing is divided here: Megatron divides the sum over microbatches and ranks by the sum of denominators
    (calculate_per_token_loss), so the gradient does not depend on the layout. A mask without a token gives a loss of 0 that
    still has a gradient, of 0. Responses are whole in a microbatch.

    Metrics (detached float64 scalars over tokens, whatever algo.aggregate is; policy_loss with its weight, kl_loss and entropy
    without their coefficients): policy_loss, clip_frac_low, clip_frac_high, with a dual clip clip_frac_dual, ratio, ratio_max,
    kl_old_new (k3 of old against new); with a reference kl_loss, kl_k1 and kl_k3 (new against ref); with entropy_T entropy.

    Shapes: logp_new_T, entropy_T, adv_T [T] as batch's tensors -> loss [], denominator [] int64, {name: []}
    Units: nats for KL and entropy.
    Raises: ValueError when the batch lacks logp_old_T, logp_ref_T or entropy_T is None with its coefficient not 0, or algo lacks
    what a named part needs.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 8; each part names its own.
    """
    mask_T = batch.mask_T
    if batch.logp_old_T is None:
        raise ValueError("policy_objective needs logp_old_T; call batch.with_logp first")
    # Selected first, so that what is stored outside the mask reaches no gradient: 0 * NaN in a backward pass is NaN.
    new_T, old_T = (on_mask(at_least_float32(logp_T), mask_T) for logp_T in (logp_new_T, batch.logp_old_T))
    found = policy_loss(new_T, batch, adv_T, algo)
    loss_T, metrics = found.loss_T, _policy_metrics(found, new_T, old_T, algo)

    if batch.logp_ref_T is not None:
        ref_T = on_mask(at_least_float32(batch.logp_ref_T), mask_T)
        kl_T = kl_loss(algo.kl_loss, new_T, ref_T, log_ratio(new_T, old_T, mask_T))
        if algo.kl_loss_coef != 0.0:  # 0 * inf is NaN, and an unused term needs no backward pass
            loss_T = loss_T + algo.kl_loss_coef * kl_T
        metrics |= {"kl_loss": kl_T.detach().double().sum()} | _ref_metrics(new_T, ref_T)
    elif algo.kl_loss_coef != 0.0:
        raise ValueError(f"kl_loss_coef is {algo.kl_loss_coef}, so policy_objective needs logp_ref_T")

    if entropy_T is not None:
        entropy_T = on_mask(at_least_float32(entropy_T), mask_T)
        if algo.entropy_coef != 0.0:
            loss_T = loss_T - algo.entropy_coef * entropy_T
        metrics["entropy"] = entropy_T.detach().double().sum()
    elif algo.entropy_coef != 0.0:
        raise ValueError(f"entropy_coef is {algo.entropy_coef}, so policy_objective needs entropy_T")
    return *aggregate(loss_T, mask_T, batch.cu_len_S1, algo.aggregate, algo.aggregate_tokens), metrics


@torch.no_grad()
def _policy_metrics(found: TokenLoss, new_T: Tensor, old_T: Tensor, algo: Algo) -> dict[str, Tensor]:
    ratio_T = found.ratio_T.double()
    metrics = {
        "policy_loss": found.loss_T.double().sum(),
        "clip_frac_low": found.is_clipped_low_T.sum().double(),
        "clip_frac_high": found.is_clipped_high_T.sum().double(),
        "ratio": ratio_T.sum(),
        "ratio_max": ratio_T.max() if ratio_T.numel() else ratio_T.sum(),
        "kl_old_new": k3(old_T.double(), new_T.double()).sum(),
    }
    return metrics if algo.dual_clip is None else metrics | {"clip_frac_dual": found.is_clipped_dual_T.sum().double()}


@torch.no_grad()
def _ref_metrics(new_T: Tensor, ref_T: Tensor) -> dict[str, Tensor]:
    new_T, ref_T = new_T.double(), ref_T.double()
    return {"kl_k1": k1(new_T, ref_T).sum(), "kl_k3": k3(new_T, ref_T).sum()}
