"""What the patches ask about the host."""

from __future__ import annotations

import torch


def has_accelerator() -> str | None:
    """Why the CPU mends are not needed here, or None when they are."""
    return "CUDA is there" if torch.cuda.is_available() else None
