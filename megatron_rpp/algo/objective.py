"""The training objective of one microbatch: what is summed, over which tokens, and what is measured on the way."""

from __future__ import annotations

from torch import Tensor

from megatron_rpp.algo.aggregate import masked_sum, on_mask
from megatron_rpp.algo.kl import k1, k2, k3
from megatron_rpp.algo.policy_loss import ClippedLoss, at_least_float32, ppo_clip
from megatron_rpp.config.schema import Algo
from megatron_rpp.types import PackedBatch

# Metrics whose name ends so are reduced by maximum. All others are sums over masked tokens: add, then divide by the tokens.
MAX_SUFFIX = "_max"


def policy_objective(
    logp_new_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch, adv_T: Tensor, algo: Algo
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss summed over this microbatch's masked tokens, their number, and sums of metrics over the same tokens.

    loss = sum_t  ppo_clip(t) + kl_loss_coef * w(t) * k2(logp_new, logp_ref)(t) - entropy_coef * entropy(t)
    w = the detached ratio when algo.minibatches > 1, else 1: from the second optimiser step on, tokens come from the old
    policy, and only with its ratio is the expected gradient of k2 that of KL(new || ref).

    Nothing is divided here: Megatron divides the sum over microbatches and ranks by their number of tokens
    (calculate_per_token_loss), so the gradient does not depend on the layout. A mask without a token gives a loss of 0 that
    still has a gradient, of 0.

    Metrics (detached float64 scalars; policy_loss, kl_loss and entropy without their coefficients):
    policy_loss, clip_frac_low, clip_frac_high, ratio, ratio_max, kl_old_new (k3 of old against new); with a reference
    kl_loss (w * k2), kl_k1 and kl_k3 (new against ref); with entropy_T entropy.

    Shapes: logp_new_T, entropy_T, adv_T [T] as batch's tensors -> loss [], num_tokens [] int64, {name: []}
    Units: nats for KL and entropy.
    Raises: ValueError when the batch lacks logp_old_T, or logp_ref_T or entropy_T is None with its coefficient not 0.
    Source: REINFORCE++ arXiv 2501.03262 Eq. 8. As slime and verl, except that k2's ratio is there when it is needed.
    """
    mask_T = batch.mask_T
    if batch.logp_old_T is None:
        raise ValueError("policy_objective needs logp_old_T; call batch.with_logp first")
    # Selected first, so that what is stored outside the mask reaches no gradient: 0 * NaN in a backward pass is NaN.
    new_T, old_T = (on_mask(at_least_float32(logp_T), mask_T) for logp_T in (logp_new_T, batch.logp_old_T))
    clipped = ppo_clip(new_T, old_T, adv_T, mask_T, clip_low=algo.clip_low, clip_high=algo.clip_high)
    loss = masked_sum(clipped.loss_T, mask_T)
    metrics = _clip_metrics(clipped, new_T, old_T, mask_T)

    if batch.logp_ref_T is not None:
        ref_T = on_mask(at_least_float32(batch.logp_ref_T), mask_T)
        k2_T = k2(new_T, ref_T)
        kl_loss = (clipped.ratio_T * k2_T if algo.minibatches > 1 else k2_T).sum()
        if algo.kl_loss_coef != 0.0:  # 0 * inf is NaN, and an unused term needs no backward pass
            loss = loss + algo.kl_loss_coef * kl_loss
        metrics |= {"kl_loss": kl_loss.detach().double()} | _ref_metrics(new_T, ref_T)
    elif algo.kl_loss_coef != 0.0:
        raise ValueError(f"kl_loss_coef is {algo.kl_loss_coef}, so policy_objective needs logp_ref_T")

    if entropy_T is not None:
        if algo.entropy_coef != 0.0:
            loss = loss - algo.entropy_coef * masked_sum(entropy_T, mask_T)
        metrics["entropy"] = masked_sum(entropy_T.detach().double(), mask_T)
    elif algo.entropy_coef != 0.0:
        raise ValueError(f"entropy_coef is {algo.entropy_coef}, so policy_objective needs entropy_T")
    return loss, mask_T.sum(), metrics


def _clip_metrics(clipped: ClippedLoss, new_T: Tensor, old_T: Tensor, mask_T: Tensor) -> dict[str, Tensor]:
    ratio_T = clipped.ratio_T.double()
    return {
        "policy_loss": masked_sum(clipped.loss_T.detach().double(), mask_T),
        "clip_frac_low": clipped.is_clipped_low_T.sum().double(),
        "clip_frac_high": clipped.is_clipped_high_T.sum().double(),
        "ratio": ratio_T.sum(),
        "ratio_max": ratio_T.max() if ratio_T.numel() else ratio_T.sum(),
        "kl_old_new": k3(old_T.double(), new_T.detach().double()).sum(),
    }


def _ref_metrics(new_T: Tensor, ref_T: Tensor) -> dict[str, Tensor]:
    new_T, ref_T = new_T.detach().double(), ref_T.double()
    return {"kl_k1": k1(new_T, ref_T).sum(), "kl_k3": k3(new_T, ref_T).sum()}
