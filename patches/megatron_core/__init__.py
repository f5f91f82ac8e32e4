"""Megatron-Core 0.16.1 on a machine without CUDA and Transformer Engine.

With a CUDA device every device patch is inactive, with Transformer Engine every mend for its absence; only the check
for psutil is left.
"""

from __future__ import annotations

from megatron_rpp_patches.megatron_core import (
    p001_torch,
    p010_jit_fuser,
    p020_rng,
    p030_recompute,
    p040_moe,
    p050_optimizer_state,
    p060_gloo,
    p070_host,
    p080_spec,
)

PATCHES = (
    *p070_host.PATCHES,
    *p001_torch.PATCHES,
    *p010_jit_fuser.PATCHES,
    *p020_rng.PATCHES,
    *p030_recompute.PATCHES,
    *p040_moe.PATCHES,
    *p050_optimizer_state.PATCHES,
    *p060_gloo.PATCHES,
    *p080_spec.PATCHES,
)
