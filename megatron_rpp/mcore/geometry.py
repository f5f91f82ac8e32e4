"""What of a model must divide by what of a layout, said with the numbers, before Megatron says it with an assertion. Pure."""

from __future__ import annotations

from megatron_rpp.config.geometry import UNEVEN_SPLITS
from megatron_rpp.config.schema import Parallel, Scalar
from megatron_rpp.errors import GeometryError
from megatron_rpp.mcore.hf_config import HfModel


def check_geometry(hf: HfModel, parallel: Parallel, overrides: dict[str, Scalar]) -> None:
    """overrides: model.megatron, by which layers may be split unevenly. Raises: GeometryError."""
    _must_divide(hf.num_heads, parallel.tp, "attention heads", "parallel.tp")
    if hf.num_heads % hf.num_kv_heads:
        raise GeometryError(
            "query heads do not divide into groups", where="config.json", expected=f"a multiple of {hf.num_kv_heads}", got=hf.num_heads
        )
    if hf.num_kv_heads % parallel.tp and parallel.tp % hf.num_kv_heads:
        raise GeometryError(
            "the key-value heads do not divide",
            where="parallel.tp",
            expected=f"a divisor or a multiple of the {hf.num_kv_heads} key-value heads",
            got=parallel.tp,
        )
    if hf.experts is None or not all(hf.experts.is_sparse):
        _must_divide(hf.ffn_hidden_size, parallel.tp, "rows of the feed-forward network", "parallel.tp")
    _check_experts(hf, parallel)
    stages = parallel.pp * parallel.vpp
    if hf.num_layers % stages and not any(overrides.get(name) for name in UNEVEN_SPLITS):
        raise GeometryError(
            "the layers do not divide over the pipeline",
            where="parallel.pp",
            expected=f"a divisor of the {hf.num_layers} layers",
            got=f"pp {parallel.pp} x vpp {parallel.vpp} = {stages}",
            fix="or say how to split them, with model.megatron.num_layers_in_first_pipeline_stage and ..._last_...",
        )


def _check_experts(hf: HfModel, parallel: Parallel) -> None:
    if hf.experts is None and parallel.ep * parallel.etp > 1:
        got = f"ep {parallel.ep} x etp {parallel.etp}"
        raise GeometryError("the model has no experts to spread", where="parallel.ep", expected="ep 1 x etp 1", got=got)
    if hf.experts is not None:
        _must_divide(hf.experts.num_experts, parallel.ep, "experts", "parallel.ep")
        _must_divide(hf.experts.ffn, parallel.etp, "rows of an expert", "parallel.etp")
        _must_divide(hf.experts.shared_ffn, parallel.tp, "rows of the shared expert", "parallel.tp")
    if (hf.experts is not None or hf.latent is not None) and parallel.tp > 1 and not parallel.sp:
        what = "experts" if hf.experts is not None else "latent attention"
        raise GeometryError(f"{what} need sequence parallelism", where="parallel.sp", expected=f"true with tp {parallel.tp}", got=False)


def _must_divide(size: int, parts: int, what: str, where: str) -> None:
    if size % parts:
        raise GeometryError(f"the {what} do not divide", where=where, expected=f"a divisor of the {size} {what}", got=parts)
