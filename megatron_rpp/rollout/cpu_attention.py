"""Decode attention for a whole batch at once, for engines on a CPU.

SGLang's torch_native backend calls torch once for each sequence and layer; with the models one runs on a CPU those calls
are more than half of a decode step. Here sequences whose lengths round up to the same multiple go together. A sequence's
padded length is its own affair, and with one thread attention treats each row of a batch alone, so results still do not
depend on who else is in the batch. (With more, torch cuts the work by its amount.)
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

LENGTH_STEP = 64


class BatchedDecodeBackend(TorchNativeAttnBackend):
    """torch_native with another decode."""

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Tensor:
        """Shapes: query [B, H, D]; output [B, H, D_v]; caches [tokens, H_kv, D or D_v]; req_to_token [requests, positions]; seq_lens [B].

        D_v is less than D in latent attention, whose values are its keys without their rotary part.
        """
        if encoder_lens is not None or (sliding_window_size or -1) > -1 or query.dtype != k_cache.dtype:
            named = {"encoder_lens": encoder_lens, "scaling": scaling, "enable_gqa": enable_gqa, "causal": causal}
            named |= {"is_cross_attn": is_cross_attn, "sliding_window_size": sliding_window_size}
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, **named)
        padded = (seq_lens + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
        for length in padded.unique().tolist():
            rows = (padded == length).nonzero().squeeze(1)
            is_there = torch.arange(length) < seq_lens[rows, None]  # [B, length]
            table = req_to_token[req_pool_indices[rows], :length]
            slots = torch.where(is_there, pad(table, (0, length - table.shape[1])), 0).flatten()  # the table may end before the step
            keys, values = (_gather(cache, slots, length) for cache in (k_cache, v_cache))
            values = pad(values, (0, keys.shape[-1] - values.shape[-1]))  # torch's fast attention wants one width
            mask = is_there[:, None, None, :]
            attended = scaled_dot_product_attention(
                query[rows].unsqueeze(2), keys, values, attn_mask=mask, scale=scaling, enable_gqa=enable_gqa
            )
            output[rows] = attended.squeeze(2)[..., : output.shape[-1]]
        return output


def _gather(cache: Tensor, slots: Tensor, length: int) -> Tensor:
    """[tokens, H_kv, D] -> [B, H_kv, length, D]. Whole rows are copied, which is what makes it quick."""
    rows = cache.view(cache.shape[0], -1).index_select(0, slots)
    return rows.view(-1, length, *cache.shape[1:]).transpose(1, 2)


def register() -> None:
    """Stand in for `torch_native`, under its name: SGLang asks for the name elsewhere too.

    Latent attention is always computed in latent space. Left to itself SGLang expands the keys and values of a prompt and hands
    them over beside a cache of latents, and torch_native, which looks at nothing but the cache, takes the latents for them.
    """
    register_attention_backend("torch_native")(BatchedDecodeBackend)
    AttentionBackendRegistry.register("torch_native", lambda layer, batch: AttnForwardMethod.MLA)
