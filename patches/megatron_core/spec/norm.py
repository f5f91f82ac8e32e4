"""The layer norm that stands where Megatron-Core takes Transformer Engine's TENorm."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class CPUNorm:
    """Makes torch's LayerNorm or RMSNorm, as `config.normalization` says.

    Its parameters carry the `sequence_parallel` mark by which Megatron sums their gradients over the tensor-parallel
    ranks, each of which has seen other tokens.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        check_norm(config)
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm


def check_norm(config: TransformerConfig) -> None:
    """Raise ValueError for norms that are not made here."""
    if config.normalization not in ("RMSNorm", "LayerNorm"):
        raise ValueError(f"config.normalization must be RMSNorm or LayerNorm on the CPU, got {config.normalization}")
    if config.layernorm_zero_centered_gamma:
        raise ValueError("config.layernorm_zero_centered_gamma is not supported on the CPU, got True; set it to False")
