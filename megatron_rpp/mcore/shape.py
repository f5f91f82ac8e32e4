"""From the shape of a model to the fields of Megatron's TransformerConfig that carry it. Pure but for an activation function."""

from __future__ import annotations

from typing import Any

from torch.nn import functional

from megatron_rpp.hf.experts import ExpertShape, Router
from megatron_rpp.hf.model import HfModel, LatentShape
from megatron_rpp.hf.rope import Rope


def shape_settings(hf: HfModel) -> dict[str, Any]:
    """Everything that config.json says about the mathematics, by Megatron's names."""
    settings = _dense(hf)
    if hf.latent is not None:
        settings |= _latent(hf.latent, hf.rope)
    if hf.experts is not None and hf.router is not None:
        settings |= {**_experts(hf.experts), **_router(hf.router, hf.experts.top_k)}
    return settings


def _dense(hf: HfModel) -> dict[str, Any]:
    return dict(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.family.qkv_bias,
        qk_layernorm=hf.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _latent(latent: LatentShape, rope: Rope) -> dict[str, Any]:
    is_yarn = rope.type == "yarn"
    return dict(
        multi_latent_attention=True,
        qk_layernorm=True,  # the norms of the two low-rank projections
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        kv_channels=latent.nope_dim,
        qk_head_dim=latent.nope_dim,
        qk_pos_emb_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        rope_type="yarn" if is_yarn else "rope",
        rotary_base=rope.theta,
        # also without yarn: the scale of the softmax is computed from it
        rotary_scaling_factor=rope.factor if is_yarn else 1.0,
        original_max_position_embeddings=rope.original_max_positions,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
    )


def _experts(experts: ExpertShape) -> dict[str, Any]:
    return dict(
        num_moe_experts=experts.num_experts,
        moe_ffn_hidden_size=experts.ffn,
        moe_layer_freq=[int(is_sparse) for is_sparse in experts.is_sparse],
        moe_shared_expert_intermediate_size=experts.shared_ffn or None,
        moe_shared_expert_gate=experts.has_shared_gate,
        moe_grouped_gemm=True,
    )


def _router(router: Router, top_k: int) -> dict[str, Any]:
    """Softmax over the chosen experts alone is softmax over all, renormalised: what Megatron has no flag of its own for."""
    return dict(
        moe_router_topk=top_k,
        moe_router_score_function=router.score,
        moe_router_pre_softmax=router.score == "softmax" and not router.renormalise,
        moe_router_topk_scaling_factor=router.scale if router.scale != 1.0 else None,
        moe_router_num_groups=router.num_groups if router.num_groups > 1 else None,
        moe_router_group_topk=router.groups_taken if router.num_groups > 1 else None,
        moe_router_enable_expert_bias=router.has_bias,
        # A roll-out engine chooses experts by the same biases: they move only where model.megatron says so.
        moe_router_bias_update_rate=0.0,
        moe_router_dtype="fp32",
        # Reinforcement learning has a policy to keep: no auxiliary loss pulls at its router unless model.megatron says so.
        moe_aux_loss_coeff=0.0,
    )
