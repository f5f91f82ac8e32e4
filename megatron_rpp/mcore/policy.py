"""The policy (and the frozen reference) as the training loop sees it: log-probabilities and updates."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rpp.algo.objective import policy_objective
from megatron_rpp.config.geometry import num_optimiser_steps
from megatron_rpp.config.schema import Algo, Config
from megatron_rpp.mcore.model import MegatronModel
from megatron_rpp.types import PackedBatch, UpdateStats

if TYPE_CHECKING:
    from megatron_rpp.mcore.forward import Objective


class Policy(MegatronModel):
    """A language model that is trained, or kept as the reference."""

    end = "logp"

    @classmethod
    def num_steps(cls, cfg: Config) -> int:
        """While a critic warms up the policy makes none."""
        return num_optimiser_steps(cfg)

    def logprobs(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the masked tokens, on every rank of the replica; 0 elsewhere.

        logp_T[t] = log_softmax(logits[t - 1] / temperature)[tokens_T[t]]   where mask_T[t] is True
        Shapes: -> [T] float32, on the batch's device
        """
        return self._first_answers(batch, "log-probabilities", temperature)

    def update(
        self, batch: PackedBatch, adv_T: Tensor, algo: Algo, *, temperature: float = 1.0, objective: Objective | None = None
    ) -> UpdateStats:
        """algo.minibatches optimiser steps on one roll-out batch.

        objective: default policy_objective under `algo`. See MegatronModel._steps for what a step is.
        Shapes: adv_T [T] float32
        """
        if objective is None:
            objective = partial(policy_objective, algo=algo)
        live_T = batch.mask_T
        if batch.weight_T is not None and algo.kl_loss_coef == algo.entropy_coef == 0.0:  # a token of weight 0 still has those terms
            live_T = live_T & (batch.weight_T != 0)
        return self._steps(batch, adv_T, algo.minibatches, objective, temperature=temperature, live_T=live_T)

    def supervise(self, batch: PackedBatch) -> UpdateStats:
        """One optimiser step on the mean negative log-likelihood of the masked tokens (supervised warm-up)."""
        return self._steps(batch, torch.zeros(batch.num_tokens), 1, negative_log_likelihood)


def negative_log_likelihood(
    logp_new_T: Tensor, entropy_T: Tensor, batch: PackedBatch, adv_T: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The objective of supervised training: loss = -sum of logp over the masked tokens. adv_T is not looked at."""
    loss = -logp_new_T.sum()
    return loss, batch.mask_T.sum(), {"policy_loss": loss, "entropy": entropy_T.sum()}
