"""Rotary frequencies of a model, as transformers computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rpp.hf.rope import Rope


def inv_freq(rope: Rope, head_dim: int) -> Tensor:
    """Rotary frequencies, exactly as transformers computes them (float32, same order of operations).

    default: theta^(-2i/d);  linear: that / factor;  llama3: / factor for long waves, unchanged for short ones, and a blend in between
    Shapes: -> [head_dim / 2] float32
    Source: transformers modeling_rope_utils; Megatron's own llama3 scaling fixes three of the four constants.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.type == "linear":
        return frequency / rope.factor
    if rope.type == "default":
        return frequency
    wavelength = 2 * math.pi / frequency
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_scaled = rope.original_max_positions / rope.low_freq_factor
    scaled = torch.where(wavelength > shortest_scaled, frequency / rope.factor, frequency)
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    is_between = (wavelength >= longest_kept) & (wavelength <= shortest_scaled)
    return torch.where(is_between, blended, scaled)
