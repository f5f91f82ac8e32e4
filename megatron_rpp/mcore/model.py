"""What policy, frozen reference and critic have in common: one Megatron model over all ranks, trained, put to sleep, saved.

This module can be imported at any time. The modules beside it that import megatron are imported inside `from_config` and
where a checkpoint is met, because megatron may only be imported after `init.start` has put the patches in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from megatron_rpp.config.schema import Config, Optim
from megatron_rpp.data.packing import select, split_minibatches, token_index
from megatron_rpp.dist.collectives import gather_objects, sum_int64
from megatron_rpp.dist.deadline import deadline
from megatron_rpp.dist.groups import Groups
from megatron_rpp.hf.model import HfModel, read_model
from megatron_rpp.mcore.sums import Sums, update_stats
from megatron_rpp.types import PackedBatch, UpdateStats

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rpp.mcore.forward import Objective
    from megatron_rpp.mcore.microbatch import Packing
    from megatron_rpp.mcore.optimizer import Optimizer, StepResult


class MegatronModel:
    """One model over all ranks. Every public method is collective over the world unless it says otherwise.

    hf: the shape of the model. chunks: this rank's pipeline chunks. optimizer: None for a frozen reference.
    """

    end: ClassVar[Literal["logp", "value"]]  # what the last stage answers

    def __init__(
        self,
        *,
        hf: HfModel,
        groups: Groups,
        chunks: list[GPTModel],
        wrapped: list,
        packing: Packing,
        optimizer: Optimizer | None,
        deadline_s: float,
    ) -> None:
        self.hf = hf
        self.groups = groups
        self.chunks = chunks
        self.optimizer = optimizer
        self._wrapped = wrapped
        self._packing = packing
        self._deadline_s = deadline_s

    @classmethod
    def from_config(
        cls, cfg: Config, groups: Groups, *, trainable: bool = True, hf_dir: Path | None = None, total_steps: int | None = None
    ) -> Self:
        """Build the model of `hf_dir` (default: model.hf). Its weights are zero until they are loaded through `named_local`.

        trainable: False builds no gradient buffers and no optimizer. total_steps: optimiser steps that the learning-rate schedule
        spans; default: those of the run.
        Raises: GeometryError, ConfigError.
        """
        from megatron_rpp.mcore.build import build_chunks, transformer_config
        from megatron_rpp.mcore.microbatch import Packing
        from megatron_rpp.mcore.optimizer import Optimizer, wrap_ddp

        hf = read_model(hf_dir or cfg.model.hf)
        device = torch.device("cuda", torch.cuda.current_device()) if _uses_cuda(groups) else torch.device("cpu")
        config = transformer_config(hf, cfg, device)
        chunks = build_chunks(hf, config, cfg.parallel.vpp, device, end=cls.end)
        packing = Packing(
            groups,
            device,
            cfg.optim.microbatch_tokens,
            cfg.parallel.vpp,
            config.sequence_parallel,
            is_count_shared=hf.experts is not None and (cfg.parallel.ep * cfg.parallel.etp > 1 or _balances_over_dp(config)),
        )
        parts = {"hf": hf, "groups": groups, "chunks": chunks, "packing": packing, "deadline_s": cfg.run.deadline_s}
        if not trainable:
            for chunk in chunks:
                chunk.requires_grad_(False)
            return cls(wrapped=chunks, optimizer=None, **parts)
        optim = cls.optim_of(cfg)
        wrapped = wrap_ddp(chunks, config, optim)
        steps = total_steps if total_steps is not None else cls.num_steps(cfg)
        return cls(wrapped=wrapped, optimizer=Optimizer(wrapped, optim, config.params_dtype, steps), **parts)

    @classmethod
    def num_steps(cls, cfg: Config) -> int:
        """Optimiser steps of a whole run."""
        return cfg.run.steps * cfg.algo.minibatches

    @classmethod
    def optim_of(cls, cfg: Config) -> Optim:
        """The settings of this model's optimizer."""
        return cfg.optim

    @property
    def dtype(self) -> torch.dtype:
        return self.chunks[0].config.params_dtype

    def named_local(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """(Megatron name inside its chunk, layer over the whole model from 0 or None, live tensor). Not collective.

        All parameters and, of routers that have them, the expert biases, float32 buffers. Experts are numbered as this rank
        counts them: `mlp.experts.linear_fc1.weight{j}` is expert ep_rank * (experts / ep) + j of the model.
        Whoever writes into the tensors calls `weights_changed` afterwards.
        """
        from megatron_rpp.mcore.build import named_tensors

        return named_tensors(self.chunks)

    def weights_changed(self) -> None:
        """Tell the optimizer that parameters were written from outside, so that its float32 copies follow. Not collective."""
        if self.optimizer is not None:
            self.optimizer.inner.reload_model_params()

    def sleep(self) -> None:
        """Free what training alone needs: gradient buffers, and optimiser state to the host. Weights stay. Nothing to do on a CPU.

        float32 weights are the optimiser's own parameters: they would leave the device with its state, so it stays.
        """
        if self.optimizer is not None and self._packing.device.type == "cuda":
            for chunk in self._wrapped:
                chunk.offload_grad_buffers()
            if self.dtype is not torch.float32:
                self.optimizer.inner.offload_to_cpu()

    def wake(self) -> None:
        """Undo `sleep`; harmless without one."""
        if self.optimizer is not None and self._packing.device.type == "cuda":
            for chunk in self._wrapped:
                chunk.restore_grad_buffers()
            if self.dtype is not torch.float32:
                self.optimizer.inner.restore_from_cpu()

    def save(self, directory: Path) -> None:
        """Write weights, optimizer, schedule and random states into `directory`, for `load` in this or another layout."""
        from megatron_rpp.mcore.checkpoint import save

        with self._wait("save of a checkpoint"):
            save(directory, self.hf, self.chunks, self._trained(), self.groups, deadline_s=self._deadline_s)

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote: bit for bit on the same layout. Raises: CheckpointError, on every rank."""
        from megatron_rpp.mcore.checkpoint import load

        with self._wait("load of a checkpoint"):
            load(directory, self.hf, self.chunks, self._trained(), self.groups, deadline_s=self._deadline_s)

    def load_weights(self, directory: Path) -> None:
        """Take the weights alone, of what `save` or tools/convert_hf_to_megatron.py wrote, in any layout. Raises: as `load`."""
        from megatron_rpp.mcore.weights_only import load_weights

        with self._wait("load of weights"):
            load_weights(directory, self.hf, self.chunks, self.groups, deadline_s=self._deadline_s)
        self.weights_changed()

    def _trained(self) -> Optimizer:
        assert self.optimizer is not None, "a frozen reference has no optimizer"
        return self.optimizer

    def _first_answers(self, batch: PackedBatch, what: str, temperature: float = 1.0) -> Tensor:
        """The first row of what the last stage answers, for every masked token and on every rank of the replica; 0 elsewhere.

        Shapes: -> [T] float32, on the batch's device
        """
        from megatron_rpp.mcore.forward import run_answers

        self._set_training(False)
        with self._wait(what):
            answer_T = run_answers(self._wrapped, self._packing.microbatches(batch, temperature), batch.num_tokens, self.groups)
        return answer_T.to(batch.tokens_T.device)

    def _steps(
        self,
        batch: PackedBatch,
        target_T: Tensor,
        num_minibatches: int,
        objective: Objective,
        *,
        temperature: float = 1.0,
        live_T: Tensor | None = None,
    ) -> UpdateStats:
        """One optimiser step for each minibatch with a token to learn from. target_T: what the objective compares with, [T].

        live_T: the tokens that the loss can learn from, [T] bool; default: those of the mask.

        A sequence's minibatch depends on its group alone, hence not on dp. In each step the loss is a sum over all ranks divided
        by the sum of denominators, and every statistic a sum divided by the tokens. A step whose gradient is not finite moves
        nothing, ends the update and shows as is_finite False.
        A minibatch that has no such token on any rank is left out by all: Adam would move the weights by its momentum and decay.
        """
        parts, done = split_minibatches(batch.group_S, num_minibatches), []
        indices = [token_index(batch.cu_len_S1, sequences) for sequences in parts]
        counts = self._count(batch.mask_T if live_T is None else live_T, indices)
        for sequences, index, num_live in zip(parts, indices, counts, strict=True):
            if num_live == 0:
                # The schedule is laid over the minibatches of a run, so that it ends where the run ends, whatever was left out.
                self._trained().scheduler.step(1)
                continue
            done.append(self._step(select(batch, sequences), target_T[index], objective, temperature))
            if not done[-1][1].is_finite:
                break
        return self._stats(done)

    def _count(self, live_T: Tensor, indices: Sequence[Tensor]) -> list[int]:
        """How many of these tokens each part has, over all data-parallel ranks. One sum for all parts, before any forward pass, so that
        nobody waits in one that others leave out."""
        mine = torch.stack([live_T[index.to(live_T.device)].sum() for index in indices])
        return sum_int64(mine, self.groups.dp, name="tokens of each minibatch", deadline_s=self._deadline_s).tolist()

    def _step(self, batch: PackedBatch, target_T: Tensor, objective: Objective, temperature: float) -> tuple[Sums, StepResult]:
        from megatron_rpp.mcore.forward import run_loss

        optimizer = self._trained()
        self._set_training(True)
        optimizer.zero_grad()
        microbatches = self._packing.microbatches(batch, temperature)
        with self._wait("optimiser step"):
            sums = run_loss(self._wrapped, microbatches, target_T.to(self._packing.device), objective, self.groups)
            return sums, optimizer.step()

    def _stats(self, done: list[tuple[Sums, StepResult]]) -> UpdateStats:
        """The sums of every data-parallel rank, counted once, as means. Every rank adds the same numbers, so all report the same bits."""
        is_counted = self.groups.is_last_stage and self.groups.coords.tp == self.groups.coords.cp == 0
        mine = [sums for sums, _ in done] if is_counted else []
        shares = gather_objects(mine, self.groups.world_cpu, name="statistics of an update", deadline_s=self._deadline_s)
        return update_stats([sums for share in shares for sums in share], [result for _, result in done])

    def _wait(self, name: str) -> AbstractContextManager:
        """Names the waits inside Megatron, which have the process groups' own deadline but no name."""
        rank = self.groups.rank
        peers = tuple(peer for peer in range(self.groups.size) if peer != rank)
        waiting_for = "the other ranks of the model"
        return deadline(name, self._deadline_s, rank=rank, waiting_for=waiting_for, peers=peers, is_work=True)

    def _set_training(self, is_training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(is_training)


def _balances_over_dp(config: TransformerConfig) -> bool:
    """Whether routers count tokens over all data-parallel ranks in every forward pass."""
    kinds = config.moe_router_load_balancing_type
    return "global_aux_loss" in ([kinds] if isinstance(kinds, str) else kinds)


def _uses_cuda(groups: Groups) -> bool:
    return torch.distributed.get_backend(groups.world) == "nccl"
