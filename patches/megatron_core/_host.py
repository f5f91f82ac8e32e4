"""What this machine has, asked without importing more than torch."""

from __future__ import annotations

import importlib.util


def has_cuda() -> str | None:
    """Why a stand-in for CUDA is not needed, or None."""
    import torch

    return "a CUDA device is present" if torch.cuda.is_available() else None


def has_transformer_engine() -> str | None:
    """Why a mend for the absence of Transformer Engine is not needed, or None."""
    return "Transformer Engine is installed" if importlib.util.find_spec("transformer_engine") else None


def has_fused_adam() -> str | None:
    """Why torch's AdamW is not the optimiser underneath, or None. Megatron looks for Transformer Engine, then for Apex."""
    return has_transformer_engine() or ("Apex is installed" if importlib.util.find_spec("apex") else None)


def has_cuda_or_transformer_engine() -> str | None:
    """Why modules of our own are not wanted in Transformer Engine's place, or None."""
    return has_cuda() or has_transformer_engine()
