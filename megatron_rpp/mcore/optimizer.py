"""Gradients to new weights: Megatron's DDP buffers, its Adam, and its learning-rate schedule, behind one `step`.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rpp.config.schema import Optim
from megatron_rpp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepResult:
    """grad_norm: over all parameters, before clipping. is_finite: False means that the weights were left as they were."""

    grad_norm: float
    lr: float
    is_finite: bool


def wrap_ddp(chunks: Sequence[torch.nn.Module], config: TransformerConfig, optim: Optim) -> list[DistributedDataParallel]:
    """Give every chunk its gradient buffers and tell the schedule how to finish the gradients.

    Gradients are accumulated and reduced in float32 whatever the weights are. Reduction overlaps with the backward pass on a
    GPU; on gloo there is nothing to hide it behind.
    """
    overlap = next(chunks[0].parameters()).is_cuda
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=optim.distributed, check_for_nan_in_grad=False
    )
    # Buckets would only help the first chunk: the others' reductions are already off the critical path.
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


class Optimizer:
    """Adam with decoupled weight decay on the chunks of this rank, and the schedule of `optim`.

    The learning rate of optimiser step k (from 1) is the schedule's value at k: warm-up starts at lr / warmup_steps and no step
    is spent on a rate of 0. Biases and norms are not decayed.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optim: Optim, dtype: torch.dtype, total_steps: int) -> None:
        _check(optim, total_steps)
        self._chunks = chunks
        self._clip_grad = optim.clip_grad
        self.is_distributed = optim.distributed
        self.inner: MegatronOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                adam_eps=optim.eps,
                clip_grad=optim.clip_grad,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=optim.distributed,
            ),
            list(chunks),
        )
        self.scheduler = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=min(optim.min_lr, optim.lr),
            lr_warmup_steps=optim.warmup_steps,
            lr_decay_steps=max(total_steps, optim.warmup_steps + 1),
            lr_decay_style=optim.schedule,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # a resumed run follows its configuration, so that a longer run can be had by raising run.steps
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    def zero_grad(self) -> None:
        """Forget the gradients of the last step. Call it before every forward and backward pass."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def sharded_state(self, model: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Megatron's sharded state dict, complete at step 0 too. model: that of the chunks. Collective.

        Adam makes its moments in its first step. They are made here as it would, zeros and step 0, because a load asks for them.
        """
        parts = self.inner.chained_optimizers
        for part in parts:
            part.init_state_fn(part.optimizer, part.config)
            for moments in _torch_moments(part):
                moments.setdefault("step", torch.tensor(0.0))
        state = self.inner.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        if not self.is_distributed:
            for part, content in zip(parts, [state] if len(parts) == 1 else state.values(), strict=True):
                if _torch_moments(part):  # Megatron leaves a step of 0 out, without which torch's Adam refuses the moments
                    content.get("optimizer", content)["state"].setdefault("common_step", torch.tensor(0.0))
        return state

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip the finished gradients and move the weights, unless the gradient's norm is not finite. Collective."""
        self.scheduler.step(1)
        lr = self.scheduler.get_lr({})
        found_inf = self.inner.prepare_grads()
        grad_norm = float(self.inner.get_grad_norm())
        if found_inf or not math.isfinite(grad_norm):
            return StepResult(grad_norm, lr, is_finite=False)
        for part in self.inner.chained_optimizers:  # one, and with experts another one for them
            if self._clip_grad > 0.0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, max_norm=self._clip_grad, total_norm=grad_norm)
        self.inner.step_with_ready_grads()
        return StepResult(grad_norm, lr, is_finite=True)


def _torch_moments(part: MegatronOptimizer) -> list[dict[str, Any]]:
    """The state of each parameter in torch's AdamW, which counts steps there; fused Adams count in their parameter groups."""
    return list(part.optimizer.state.values()) if isinstance(part.optimizer, torch.optim.AdamW) else []


def _check(optim: Optim, total_steps: int) -> None:
    if optim.schedule != "constant" and optim.warmup_steps >= total_steps:
        raise ConfigError(
            "the warm-up leaves no step for the decay",
            where="optim.warmup_steps",
            expected=f"less than the {total_steps} optimiser steps of the run",
            got=optim.warmup_steps,
        )
    if optim.min_lr > optim.lr:
        raise ConfigError(
            "the lowest learning rate is above the highest", where="optim.min_lr", expected=f"at most {optim.lr}", got=optim.min_lr
        )
