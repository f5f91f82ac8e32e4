"""What Megatron-Core asks for the classes of a layer, answered without Transformer Engine."""

from __future__ import annotations

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_rpp_patches.megatron_core.spec.attention import CPUDotProductAttention
from megatron_rpp_patches.megatron_core.spec.linear import (
    CPUColumnParallelGroupedLinear,
    CPUColumnParallelLinear,
    CPULayerNormColumnParallelLinear,
    CPULinear,
    CPURowParallelGroupedLinear,
    CPURowParallelLinear,
)
from megatron_rpp_patches.megatron_core.spec.norm import CPUNorm


class CPUSpecProvider(BackendSpecProvider):
    """Stands for TESpecProvider; the methods answer the same questions."""

    def linear(self) -> type:
        return CPULinear

    def column_parallel_linear(self) -> type:
        return CPUColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return CPURowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return CPULayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return CPUNorm

    def core_attention(self) -> type:
        return CPUDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool) -> tuple[type, MLPSubmodules]:
        if not moe_use_grouped_gemm:
            return SequentialMLP, MLPSubmodules(linear_fc1=CPUColumnParallelLinear, linear_fc2=CPURowParallelLinear)
        if moe_use_legacy_grouped_gemm:
            raise ValueError("config.moe_use_legacy_grouped_gemm must be False on the CPU, got True")
        return TEGroupedMLP, MLPSubmodules(linear_fc1=CPUColumnParallelGroupedLinear, linear_fc2=CPURowParallelGroupedLinear)

    def activation_func(self) -> None:
        return None
