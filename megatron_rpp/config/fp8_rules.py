"""What block FP8 in the engine asks of the model and of the layout of an engine.

Weights have a scale for every 128 x 128 elements and activations one for every 128 of a token, so every width that an engine rank
multiplies by, and every height of what SGLang fuses, must be made of whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rpp.config.problems import Problem
from megatron_rpp.config.schema import Config
from megatron_rpp.hf.model import HfModel
from megatron_rpp.host import num_gpus

BLOCK = 128
_OWNED = {
    "quantization": "rollout.dtype: fp8_block says it already",
    "load_format": "an engine in FP8 is given its weights",
    "kv_cache_dtype": "such an engine has no scales for its cache; only `auto` would be right",
    "json_model_override_args": "the engine's config.json is written for FP8",
}


def fp8_problems(cfg: Config, hf: HfModel) -> Iterator[Problem]:
    """Why an engine in FP8 cannot be, where rollout.dtype asks for one. Every size of the layout is 1 or more."""
    if cfg.rollout.dtype != "fp8_block":
        return
    for name, reason in _OWNED.items():
        if name in cfg.rollout.sglang:
            yield Problem(f"rollout.sglang.{name}", f"cannot be set with rollout.dtype fp8_block: {reason}")
    is_cpu = cfg.run.device == "cpu" or (cfg.run.device == "auto" and num_gpus() == 0)
    if is_cpu and hf.latent is not None:
        message = f"{hf.model_type} has latent attention, for which SGLang has no FP8 on a CPU"
        yield Problem("rollout.dtype", f"{message}; set model, or run on a GPU (run.device: cuda)")
    if not is_cpu and cfg.model.dtype != "bfloat16":
        yield Problem("rollout.dtype", f"on a GPU SGLang's FP8 needs model.dtype bfloat16, got {cfg.model.dtype}")
    if hf.hidden_size % BLOCK:
        yield _never(hf, "hidden size", hf.hidden_size)
    for what, size, parts in _cut(cfg, hf):
        if size % parts:
            continue  # other rules speak of that
        if size % BLOCK:
            yield _never(hf, what, size)
        elif size // parts % BLOCK:
            message = f"fp8_block needs multiples of {BLOCK} on each rank: cut in {parts}, the {what} of {size} leaves {size // parts}"
            yield Problem("rollout.tp", f"{message}; choose a smaller tp, or a larger rollout.sglang.ep_size for experts")


def _never(hf: HfModel, what: str, size: int) -> Problem:
    message = f"fp8_block needs multiples of {BLOCK}, the {what} of this {hf.model_type} is {size}"
    return Problem("rollout.dtype", f"{message}; set rollout.dtype: model")


def _cut(cfg: Config, hf: HfModel) -> Iterator[tuple[str, int, int]]:
    """Whatever an engine cuts: its name, its size in the model, and in how many equal parts."""
    tp, sglang = cfg.rollout.tp, cfg.rollout.sglang
    heads_tp = max(1, tp // int(sglang.get("attn_dp_size") or 1))
    expert_tp = max(1, tp // int(sglang.get("ep_size") or 1))
    if hf.latent is None:
        yield "height of the queries", hf.num_heads * hf.head_dim, heads_tp
        yield "height of the keys and of the values", hf.num_kv_heads * hf.head_dim, min(heads_tp, hf.num_kv_heads)
    else:
        latent = hf.latent
        if latent.q_rank is not None:
            yield "width of latent queries", latent.q_rank, 1
        yield "width of latent keys and values", latent.kv_rank, 1
        yield "width of all values", hf.num_heads * latent.value_dim, heads_tp
        if heads_tp > 1:
            yield "height of the queries", hf.num_heads * (latent.nope_dim + latent.rope_dim), heads_tp
            yield "height of keys and values", hf.num_heads * (latent.nope_dim + latent.value_dim), heads_tp
    if hf.dense_layers:
        yield "feed-forward width", hf.ffn_hidden_size, tp
    if hf.experts is not None:
        yield "width of an expert", hf.experts.ffn, expert_tp
        if hf.experts.shared_ffn:
            yield "width of the shared expert", hf.experts.shared_ffn, tp
