"""What a Hugging Face config.json says about a decoder: shape, experts, latent attention, and which variant it is.

Pure: reads one JSON file, imports neither megatron nor transformers. Known are Llama (2 and 3), Qwen2 / Qwen2.5, Qwen3,
Qwen2-MoE, Qwen3-MoE, Mixtral, DeepSeek-V2 and DeepSeek-V3. Anything in the file that would change the mathematics and is not
understood here is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rpp.config.hf_shape import ExpertShape, LatentShape, read_experts, read_latent
from megatron_rpp.errors import ConfigError
from megatron_rpp.mcore.rope import Rope, parse_rope

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type means beyond sizes: which projections have biases, and whether queries and keys are normalised."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False


# The only value of an entry that is computed here; an absent entry means that value.
_SUPPORTED: Json = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,  # of Llama: also puts a bias on the output projection
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "quantization_config": None,
}
_DEEPSEEK: Json = {"moe_layer_freq": 1, "rope_interleave": True}
_SUPPORTED_OF: Mapping[str, Json] = {
    "qwen2_moe": {"qkv_bias": True},
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.0},
    # with norm_topk_prob DeepSeek's own code drops the scaling factor, and transformers the normalisation
    "deepseek_v2": {**_DEEPSEEK, "scoring_func": "softmax", "norm_topk_prob": False},
    "deepseek_v3": {**_DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}
_ROPE_THETA = {"mixtral": 1e6}  # where config.json has none; 1e4 for every other family
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("qwen2", qkv_bias=True),
        Family("qwen3", qk_norm=True),
        Family("qwen2_moe", qkv_bias=True),
        Family("qwen3_moe", qk_norm=True),
        Family("mixtral"),
        Family("deepseek_v2"),
        Family("deepseek_v3"),
    )
}


@dataclass(frozen=True, slots=True)
class Router:
    """How the experts of a token are chosen and weighed.

    score: of all experts together (softmax) or of each alone (sigmoid). renormalise: the weights of the chosen sum to scale;
    else they are scores times scale. has_bias: experts are chosen by score + bias and weighed by score. num_groups > 1: only
    the experts of the best groups_taken groups can be chosen; a group is as good as the sum of its best group_best experts.
    """

    score: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float = 1.0
    has_bias: bool = False
    num_groups: int = 1
    groups_taken: int = 1
    group_best: int = 1


@dataclass(frozen=True, slots=True)
class HfModel:
    """The shape of a model as its directory tells it. num_kv_heads, head_dim: of ordinary attention."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    is_tied: bool
    max_positions: int
    rope: Rope
    experts: ExpertShape | None = None
    router: Router | None = None
    latent: LatentShape | None = None


def read_hf_config(hf_dir: Path) -> HfModel:
    """Read and check `hf_dir`/config.json.

    Raises: ConfigError naming the file and the entry, for a missing file, an unknown model_type, or a setting that this
    implementation would otherwise silently ignore (sliding windows, other activations, other rotary scalings, biases, other
    ways to choose experts).
    """
    path = Path(hf_dir) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the model's configuration", where=str(path), got=error, fix="point model.hf at a Hugging Face model directory"
        ) from error
    return parse_hf_config(raw, where=str(path))


def parse_hf_config(raw: Json, *, where: str) -> HfModel:
    """The checks and the meaning of `read_hf_config`, on the parsed file."""
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise ConfigError("this model family is not supported", where=where, expected=" | ".join(FAMILIES), got=raw.get("model_type"))
    _refuse_unknown_mathematics(raw, family, where)
    try:
        heads = int(raw["num_attention_heads"])
        experts, latent = read_experts(raw), read_latent(raw)
        return HfModel(
            family=family,
            num_layers=int(raw["num_hidden_layers"]),
            hidden_size=int(raw["hidden_size"]),
            ffn_hidden_size=int(raw["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=heads if latent is not None else int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            vocab_size=int(raw["vocab_size"]),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            is_tied=bool(raw.get("tie_word_embeddings", False)),
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            rope=parse_rope(raw, where=where, is_latent=latent is not None, default_theta=_ROPE_THETA.get(family.model_type, 1e4)),
            experts=experts,
            router=None if experts is None else _router(raw, experts, where),
            latent=latent,
        )
    except KeyError as error:
        raise ConfigError(f"the entry {error} is missing", where=where) from error
    except (TypeError, ValueError) as error:
        raise ConfigError("an entry has a value of the wrong kind", where=where, got=error, fix="fetch config.json again") from error


def _router(raw: Json, experts: ExpertShape, where: str) -> Router:
    """Source: the routers of transformers' modeling files, and DeepSeek's own where the two differ."""
    match raw["model_type"]:
        case "mixtral":
            router = Router("softmax", renormalise=True)
        case "deepseek_v2":
            router = Router("softmax", renormalise=False, scale=float(raw.get("routed_scaling_factor", 1.0)), **_groups(raw, best=1))
        case "deepseek_v3":
            scale = float(raw["routed_scaling_factor"])
            router = Router("sigmoid", renormalise=True, scale=scale, has_bias=True, **_groups(raw, best=2))
        case _:
            router = Router("softmax", renormalise=bool(raw.get("norm_topk_prob", False)))
    if router.score == "sigmoid" and experts.top_k == 1:
        raise ConfigError("a single expert a token is not supported", where=f"{where}: num_experts_per_tok", expected="2 or more", got=1)
    if experts.num_experts % router.num_groups:
        raise ConfigError("the experts do not divide into groups", where=f"{where}: n_group", got=router.num_groups)
    open_to_choice = experts.num_experts // router.num_groups * router.groups_taken
    if not 1 <= experts.top_k <= open_to_choice:
        expected = f"1 to {open_to_choice}, the experts that a token can choose from"
        raise ConfigError(
            "impossible number of experts a token", where=f"{where}: num_experts_per_tok", expected=expected, got=experts.top_k
        )
    return router


def _groups(raw: Json, *, best: int) -> dict[str, int]:
    """The restriction to groups of experts, none where all groups may be taken. DeepSeek-V2 says so in topk_method."""
    method = raw.get("topk_method", "greedy" if raw["model_type"] == "deepseek_v2" else "noaux_tc")
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise ConfigError("unknown way to choose experts", where="config.json: topk_method", got=method)
    if method == "greedy":
        return {}
    groups, taken = int(raw["n_group"] or 1), int(raw["topk_group"] or 1)
    if groups == taken:
        return {}
    return {"num_groups": groups, "groups_taken": taken, "group_best": best}


def _refuse_unknown_mathematics(raw: Json, family: Family, where: str) -> None:
    """Entries whose other values would need code that is not here. An absent entry means the supported value."""
    supported = {**_SUPPORTED, **_SUPPORTED_OF.get(family.model_type, {})}
    if family.qkv_bias:
        del supported["attention_bias"]  # Qwen2 has its three biases whatever the file says
    for name, wanted in supported.items():
        value = raw.get(name, wanted)
        if value is not None and value != wanted:
            raise ConfigError("this setting is not supported", where=f"{where}: {name}", expected=wanted, got=value)
    other_layers = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise ConfigError(
            "these layers are not supported", where=f"{where}: layer_types", expected="full_attention", got=", ".join(other_layers)
        )
