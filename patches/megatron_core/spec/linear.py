"""Linear layers with the constructors, parameters and checkpoint keys of Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide, get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none

from megatron_rpp_patches.megatron_core.spec.norm import check_norm


class CPUColumnParallelLinear(ColumnParallelLinear):
    """Stands for TEColumnParallelLinear. Of a class of its own, because MLA asks for the class by identity."""


class CPURowParallelLinear(RowParallelLinear):
    """Stands for TERowParallelLinear."""


class CPULayerNormColumnParallelLinear(ColumnParallelLinear):
    """Stands for TELayerNormColumnParallelLinear: the norm's parameters are `layer_norm_weight` and `layer_norm_bias`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        check_norm(config)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.register_parameter("layer_norm_bias", None)
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))
            self.layer_norm_bias.sequence_parallel = config.sequence_parallel

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The norm is taken of this rank's tokens, before a sequence-parallel gather."""
        shape, eps = (input_.shape[-1],), self.config.layernorm_epsilon
        if self.config.normalization == "LayerNorm":
            normed = F.layer_norm(input_, shape, self.layer_norm_weight, self.layer_norm_bias, eps)
        else:
            normed = F.rms_norm(input_, shape, self.layer_norm_weight, eps)
        return super().forward(normed, *args, **kwargs)


class CPULinear(torch.nn.Module):
    """Stands for TELinear with parallel_mode "duplicated": the whole weight on every tensor-parallel rank.

    Raises: ValueError without sequence parallel when tensor parallel is on. Its gradient would then be that of this
    rank's heads only, here as in Transformer Engine (5 % off for the rotary key of multi-latent attention).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        parallel_mode: str | None,
        bias: bool = False,
        skip_bias_add: bool = False,
        tp_group: torch.distributed.ProcessGroup | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if parallel_mode != "duplicated" or bias:
            raise ValueError(f"only parallel_mode='duplicated' without bias is supported on the CPU, got {parallel_mode!r}, bias={bias}")
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            raise ValueError("config.sequence_parallel must be True with a duplicated linear layer under tensor parallel, got False")
        self._tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel
        self.weight.allreduce = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None

    def get_extra_state(self) -> None:
        """Transformer Engine writes a key for its fp8 state."""

    def set_extra_state(self, _: Any) -> None:
        """There is no fp8 state here."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self._tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets, **groups)


class _GroupedLinear(torch.nn.Module):
    """Stands for TEGroupedLinear: one weight for each local expert, `weight0`, `weight1`, ...

    The tokens arrive sorted by expert; communication over experts is the token dispatcher's. Shapes: x [T, input]
    with sum(m_splits) = T -> [T, output].
    """

    partition_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        bias: bool,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if bias:
            raise ValueError("bias is not supported in grouped experts on the CPU, got config.add_bias_linear=True; set it to False")
        self.num_gemms = num_gemms
        self._groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        shape = [output_size, input_size]
        shape[self.partition_dim] = divide(shape[self.partition_dim], get_pg_size(self._groups.expt_tp))
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)
            # also where one rank holds the whole expert: unmarked, Megatron takes the experts of tp_rank > 0 for copies
            # and leaves them out of the gradient norm
            set_tensor_model_parallel_attributes(weight, True, self.partition_dim, 1)
            weight.allreduce = config.expert_model_parallel_size <= 1
            self.register_parameter(f"weight{index}", weight)
        self._register_load_state_dict_pre_hook(self._drop_extra_states)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        weights = (self.get_parameter(f"weight{index}") for index in range(self.num_gemms))
        return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(m_splits), weights, strict=True)]), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def _extra_key(self, index: int) -> str:
        return f"_extra_state{index or ''}"

    def _drop_extra_states(self, state_dict: dict, prefix: str, *_: Any) -> None:
        for index in range(self.num_gemms):
            state_dict.pop(prefix + self._extra_key(index), None)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Keys as with one module for each expert, so that they do not depend on how experts are spread over ranks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        is_singleton = metadata.get("singleton_local_shards", False)
        groups, out = self._groups, {}
        for index in range(self.num_gemms):
            expert = get_pg_rank(groups.ep) * self.num_gemms + index
            offset = (len(sharded_offsets), expert, get_pg_size(groups.ep) * self.num_gemms)
            shards = make_sharded_tensors_for_checkpoint(
                {"weight": self.get_parameter(f"weight{index}"), "_extra_state": None},
                f"{expert}.{prefix}" if is_singleton else prefix,
                {"weight": self.partition_dim},
                sharded_offsets if is_singleton else (*sharded_offsets, offset),
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for shard, key in zip(shards.values(), (f"weight{index}", self._extra_key(index)), strict=True):
                shard.replica_id = (*shard.replica_id[:2], get_pg_rank(groups.expt_dp))
                out[prefix + key] = shard
        return out


class CPUColumnParallelGroupedLinear(_GroupedLinear):
    """Stands for TEColumnParallelGroupedLinear."""

    partition_dim = 0


class CPURowParallelGroupedLinear(_GroupedLinear):
    """Stands for TERowParallelGroupedLinear."""

    partition_dim = 1
