"""What an engine in FP8 should hold: slices of a model whose every whole tensor was quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.weights.quantise import is_quantised, quantise
from megatron_rpp.weights.rect import Local, view


def quantised(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the model as an FP8 checkpoint would hold it."""
    whole: dict[str, Tensor] = {}
    for name, tensor in hf.items():
        if is_quantised(name):
            whole[name], whole[f"{name}_scale_inv"] = quantise(tensor)
        else:
            whole[name] = tensor
    return whole


def cut(local: Local, whole: dict[str, Tensor]) -> Tensor:
    """A parameter of an engine rank; zero where it pads the vocabulary."""
    tensor = torch.zeros(local.shape, dtype=local.dtype)
    for piece in local.pieces:
        rect = piece.rect
        matrix = whole[rect.hf] if whole[rect.hf].dim() == 2 else whole[rect.hf][:, None]
        view(tensor, piece, rect).copy_(matrix[rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols])
    return tensor


def covered(local: Local) -> Tensor:
    """Where a piece lies; the rest pads a vocabulary."""
    mask = torch.zeros(local.shape, dtype=torch.bool)
    for piece in local.pieces:
        view(mask, piece, piece.rect).fill_(True)
    return mask


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
