"""Small configurations of every supported family, as transformers writes them."""

from __future__ import annotations

from typing import Any

from tests.mcore.hf import transformers

_SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_LATENT = {
    **_SIZES, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
    "n_shared_experts": 2,
}  # fmt: skip
# What differs between families, and within one: biases, norms, wide heads, sparse layers, shared experts, compressed queries.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES),
    "llama, one key-value head per head": ("Llama", _SIZES | {"num_key_value_heads": 4}),
    "llama, wide heads": ("Llama", _SIZES | {"head_dim": 24}),
    "qwen2, biases": ("Qwen2", _SIZES),
    "qwen3, norms and wide heads": ("Qwen3", _SIZES | {"head_dim": 32}),
    "qwen2_moe, shared expert": ("Qwen2Moe", _SIZES | _EXPERTS | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3Moe", _SIZES | _EXPERTS | {"head_dim": 24}),
    "qwen3_moe, some layers dense": ("Qwen3Moe", _SIZES | _EXPERTS | {"head_dim": 24, "mlp_only_layers": [1]}),
    "mixtral": ("Mixtral", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2, whole queries": ("DeepseekV2", _LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v2": ("DeepseekV2", _LATENT | {"q_lora_rank": 24, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", _LATENT | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}),
}


def config_of(name: str, **changes: Any) -> Any:
    """The configuration object of a variant."""
    family, sizes = VARIANTS[name]
    return getattr(transformers(), f"{family}Config")(**sizes, **changes)


def raw_of(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a variant, as the Hub has it."""
    raw = config_of(name, **changes).to_dict()
    if raw["model_type"] == "qwen3_moe":  # transformers 5 alone has another name for it
        raw["num_experts"] = raw.pop("num_local_experts")
    return raw
