"""SGLang 0.5.21 on a machine without CUDA: importable, seeded, independent of the batch, with latent attention and block FP8."""

from __future__ import annotations

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang import (
    p100_torchvision_schemas,
    p101_rotary_on_cpu,
    p102_seeded_sampling,
    p103_batch_invariance,
    p104_plain_rotary_of_latent_attention,
    p105_shared_expert_gate_on_cpu,
    p106_latent_projections_in_pieces,
    p107_fp8_linear_on_cpu,
    p108_fp8_in_float32,
    p109_fp8_experts_on_cpu,
    p110_noise_by_vocabulary,
)

PATCHES: tuple[Patch, ...] = (
    p100_torchvision_schemas.PATCH,
    p101_rotary_on_cpu.PATCH,
    p102_seeded_sampling.PATCH,
    p103_batch_invariance.PATCH,
    p104_plain_rotary_of_latent_attention.PATCH,
    p105_shared_expert_gate_on_cpu.PATCH,
    p106_latent_projections_in_pieces.PATCH,
    p107_fp8_linear_on_cpu.PATCH,
    p108_fp8_in_float32.PATCH,
    p109_fp8_experts_on_cpu.PATCH,
    p110_noise_by_vocabulary.PATCH,
)
