"""transformers, importable beside a torch without CUDA."""

from __future__ import annotations

from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def transformers() -> ModuleType:
    """The module. Its text models import torchvision, whose wheel registers functions for operators that only CUDA builds load."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)
    import transformers

    return transformers
