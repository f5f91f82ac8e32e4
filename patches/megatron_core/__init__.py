"""Megatron-Core 0.16.1 on a machine without CUDA and Transformer Engine."""

from __future__ import annotations

from megatron_rpp_patches._record import Patch

PATCHES: tuple[Patch, ...] = ()
