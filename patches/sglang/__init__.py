"""SGLang 0.5.21 on a machine without CUDA: importable, seeded, and independent of what else is in the batch."""

from __future__ import annotations

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang import p100_torchvision_schemas, p101_rotary_on_cpu, p102_seeded_sampling, p103_batch_invariance

PATCHES: tuple[Patch, ...] = (
    p100_torchvision_schemas.PATCH,
    p101_rotary_on_cpu.PATCH,
    p102_seeded_sampling.PATCH,
    p103_batch_invariance.PATCH,
)
