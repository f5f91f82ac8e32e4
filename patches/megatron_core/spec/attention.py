"""Scaled dot product attention over packed sequences, grouped heads, context-parallel shards and key-value caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class CPUDotProductAttention(MegatronModule):
    """Stands for TEDotProductAttention.

    Each sequence is one call of torch's SDPA. That is as fast as padding ~100 sequences of ~40 tokens to common lengths
    and batching them (13 ms against 10 ms a layer, forward and backward, at 4 heads of 16; 34 against 45 at 8 of 32),
    and the numbers of a sequence do not depend, to the bit, on what it is packed with.

    Shapes: query [T, H, D] packed, or [S, B, H, D]; key and value with H_kv heads, H a multiple -> [T, H * D] or
    [S, B, H * D]. Under context parallel every sequence is cut in 2 * CP chunks, of which this rank holds the
    cp_rank-th from either end; keys and values are gathered, and lengths in packed_seq_params are those of whole
    sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        _check_config(config, attention_type)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._cp_group = None
        if config.context_parallel_size > 1:
            self._cp_group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported on the CPU, got a tensor")
        if self._cp_group is not None and attention_mask is not None:
            raise ValueError("attention_mask is not supported under context parallel on the CPU, got a tensor; pass None")
        is_causal = (attn_mask_type or self.attn_mask_type) in CAUSAL
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        lengths = _lengths(packed_seq_params) if packed_seq_params is not None else None
        if self._cp_group is None:
            out = self._whole(query, key, value, lengths, is_causal, attention_mask)
        else:
            out = self._sharded(query, key, value, lengths or [query.shape[0] * self._cp_group.size()], is_causal)
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if is_packed else out

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int] | None, is_causal: bool, mask: Tensor | None) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if lengths is None or len(lengths) == 1:
            return self._attend(q, k, v, is_causal, mask)
        if mask is not None:
            raise ValueError("attention_mask cannot be combined with packed_seq_params, got a tensor; pass None")
        pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(*piece, is_causal) for piece in pieces], dim=2)

    def _sharded(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], is_causal: bool) -> Tensor:
        """Query chunk j of a sequence sees its keys up to the end of chunk j."""
        cp, rank = self._cp_group.size(), self._cp_group.rank()
        order = natural_order(lengths, cp)
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), tensor_parallel_output_grad=True, group=self._cp_group)[order]
            for x in (key, value)
        )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        outs, start = [], 0
        for length in lengths:
            chunk = length // (2 * cp)
            for which, position in enumerate((rank, 2 * cp - 1 - rank)):
                first = start // cp + which * chunk
                stop = start + (chunk * (position + 1) if is_causal else length)
                outs.append(self._attend(q[:, :, first : first + chunk], k[:, :, start:stop], v[:, :, start:stop], is_causal))
            start += length
        return torch.cat(outs, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None = None) -> Tensor:
        """Attention of [B, H, S, D] queries; causal means that the last query sees the last key. True in mask hides."""
        queries, keys = q.shape[2], k.shape[2]
        visible = None if mask is None else ~mask
        if is_causal and (visible is not None or queries != keys):
            triangle = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
            visible = triangle if visible is None else triangle & visible
        options = {"scale": self.softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if visible is None:
            options["is_causal"] = is_causal
        else:
            options["attn_mask"] = visible
        if not self.training or not self.dropout:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with get_cuda_rng_tracker().fork():  # other heads on other ranks, other drops
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, **options)


def natural_order(lengths: list[int], cp: int) -> Tensor:
    """Row in the rank-by-rank gather of every position, sequence by sequence.

    order[t] = rank * T / cp + start / cp + (0 or chunk) + position in the chunk. Shapes: lengths [S] -> [T].
    Raises: ValueError unless every length is a multiple of 2 * cp.
    """
    if any(length % (2 * cp) for length in lengths):
        raise ValueError(f"sequence lengths must be multiples of 2 * context_parallel_size = {2 * cp}, got {lengths}")
    total, start, order = sum(lengths), 0, []
    for length in lengths:
        chunk = length // (2 * cp)
        for position in range(2 * cp):
            rank, base = (position, 0) if position < cp else (2 * cp - 1 - position, chunk)
            first = rank * (total // cp) + start // cp + base
            order.append(torch.arange(first, first + chunk))
        start += length
    return torch.cat(order)


def _lengths(packed: PackedSeqParams) -> list[int]:
    if packed.qkv_format != "thd" or packed.cp_group is not None or packed.local_cp_size is not None:
        raise ValueError(f"packed_seq_params must be thd without a cp_group of its own on the CPU, got {packed.qkv_format}")
    offsets = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return offsets.diff().tolist()


def _check_config(config: TransformerConfig, attention_type: str) -> None:
    if attention_type != "self":
        raise ValueError(f"attention_type must be self on the CPU, got {attention_type}")
    unsupported = {
        "window_size": config.window_size is not None,
        "softmax_type": config.softmax_type != "vanilla",
        "qk_clip": config.qk_clip,
        "log_max_attention_logit": config.log_max_attention_logit,
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
    }
    wrong = [name for name, is_set in unsupported.items() if is_set]
    if wrong:
        raise ValueError(f"config.{', config.'.join(wrong)}: not supported on the CPU; leave the default")
