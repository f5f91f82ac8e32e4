"""The critic of PPO: a value model on the policy's backbone and layout, with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from megatron_rpp.algo.aggregate import masked_sum, on_mask
from megatron_rpp.algo.value_loss import value_loss
from megatron_rpp.config.schema import Config, Optim
from megatron_rpp.mcore.model import MegatronModel
from megatron_rpp.types import PackedBatch, UpdateStats

HEAD = "value_head.weight"


class Critic(MegatronModel):
    """V(tokens before t) for every masked token t."""

    end = "value"

    @classmethod
    def optim_of(cls, cfg: Config) -> Optim:
        """Those of the policy, but for the learning rate: critic.lr, constant."""
        return replace(cfg.optim, lr=cfg.critic.lr, min_lr=0.0, schedule="constant", warmup_steps=0)

    def named_local(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """As MegatronModel's, without the head, which no HF directory holds."""
        return (entry for entry in super().named_local() if entry[0] != HEAD)

    def values(self, batch: PackedBatch) -> Tensor:
        """The value of the state before each masked token, on every rank of the replica; 0 elsewhere.

        Shapes: -> [T] float32, on the batch's device. Units: of the return.
        """
        return self._first_answers(batch, "values")

    def update(self, batch: PackedBatch, return_T: Tensor, *, minibatches: int, value_clip: float | None) -> UpdateStats:
        """One optimiser step for each minibatch on the mean value loss of its tokens. batch.value_T: the values before the update.

        Shapes: return_T [T]
        """
        return self._steps(batch, return_T, minibatches, partial(value_objective, clip=value_clip))


def value_objective(
    value_new_T: Tensor, batch: PackedBatch, return_T: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The value loss summed over the masked tokens, their number, and sums over them of what explains the returns.

    Metrics: value_loss, value (mean of V), value_return (mean of the target), value_error2 (mean of (V - return)^2, unclipped).
    Shapes: [T] each -> [], [], {name: []}
    """
    mask_T = batch.mask_T
    loss = masked_sum(value_loss(value_new_T, batch.value_T, return_T, mask_T, clip=clip), mask_T)
    value_T, target_T = on_mask(value_new_T.detach().double(), mask_T), on_mask(return_T.double(), mask_T)
    metrics = {
        "value_loss": loss.detach().double(),
        "value": value_T.sum(),
        "value_return": target_T.sum(),
        "value_error2": (value_T - target_T).square().sum(),
    }
    return loss, mask_T.sum(), metrics
