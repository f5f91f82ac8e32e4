"""What SGLang's classes of the supported families cannot do, as far as config.json tells."""

from __future__ import annotations

from collections.abc import Collection

# Families whose class in SGLang 0.5.21 has experts in every layer and never ties the head.
_ALL_EXPERTS = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})


def engine_limit(model_type: str, *, is_tied: bool, dense_layers: Collection[int]) -> str | None:
    """Why SGLang cannot run a model; None if it can."""
    if model_type not in _ALL_EXPERTS:
        return None
    what = f"SGLang cannot run this model: its class for {model_type}"
    if is_tied:
        return f"{what} does not tie the head to the embedding, so it would sample with a random head"
    if dense_layers:
        return f"{what} has experts in every layer, but these layers of the model are dense: {', '.join(map(str, sorted(dense_layers)))}"
    return None
