"""Layer specs with Transformer Engine's names build modules that run without it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda_or_transformer_engine

COMMON = {
    "library": "megatron-core",
    "upstream": "not reported: upstream's own local spec has no norm under sequence parallel, no thd, no CP, and other parameter names",
    "versions": "==0.16.1",
    "remove_when": "the local spec covers sequence parallel, thd and CP under Transformer Engine's names",
    "expires": datetime.date(2027, 11, 30),
    "inactive": has_cuda_or_transformer_engine,
}


def _provider(_: Any) -> type:
    from megatron_rpp_patches.megatron_core.spec.provider import CPUSpecProvider

    return CPUSpecProvider


def _norm(_: Any) -> type:
    from megatron_rpp_patches.megatron_core.spec.norm import CPUNorm

    return CPUNorm


def _linear(_: Any) -> type:
    from megatron_rpp_patches.megatron_core.spec.linear import CPULinear

    return CPULinear


def _probe() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    name = spec.submodules.self_attention.submodules.linear_qkv.__name__
    assert name == "CPULayerNormColumnParallelLinear", name
    get_gpt_layer_with_transformer_engine_spec(num_experts=2, moe_grouped_gemm=True, multi_latent_attention=True)


def _patch(number: int, noun: str, target: str, source: str | None, make: Callable, why: str) -> Patch:
    return Patch(
        **COMMON,
        id=f"p08{number}-spec-{noun}",
        target=target,
        kind="replace" if target == PROVIDER else "value",  # replace: modules that have bound the provider get ours too
        source=source,
        make=make,
        why=why,
        probe=_probe,
        test=f"tests/patches/test_necessity.py::test_without_the_patch[p08{number}-spec-{noun}]",
    )


SPECS = "megatron.core.models.gpt.gpt_layer_specs"
LAYER = f"{SPECS}:get_gpt_layer_with_transformer_engine_spec"
BLOCK = f"{SPECS}:get_gpt_decoder_block_spec"
PROVIDER = "megatron.core.extensions.transformer_engine_spec_provider:TESpecProvider"
NORM = "megatron.core.transformer.transformer_block:LayerNormImpl"
MLA = "megatron.core.transformer.multi_latent_attention"
ASKS = f"{MLA}:MLASelfAttention.__init__"
PATCHES = (
    _patch(0, "provider", PROVIDER, None, _provider, "the classes it names raise ImportError when a layer is built"),
    _patch(1, "gpt-provider", f"{SPECS}:TESpecProvider", LAYER, _provider, "NameError: its import stands after one that fails"),
    _patch(2, "gpt-norm", f"{SPECS}:TENorm", BLOCK, _norm, "NameError: its import stands after one that fails"),
    _patch(3, "block-norm", NORM, None, _norm, "WrappedTorchNorm asserts that sequence parallel is off"),
    _patch(4, "mla-linear", f"{MLA}:TELinear", ASKS, _linear, "MLA asks by identity which class has its whole output on every rank"),
)
