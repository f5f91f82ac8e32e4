"""Latent attention with plain rotary positions on a CPU.

SGLang builds the rotary layer of latent attention for a CPU by a function that knows DeepSeek's yarn only. Where config.json
asks for no scaling, the one of every other device serves: interleaved pairs, cosine and sine of position * theta^(-2i/d).
"""

from __future__ import annotations

import datetime
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def get_rope_cpu(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named).arguments
        if given.get("rope_scaling") is not None:
            return original(*args, **named)
        given.pop("device", None)  # the other has no such argument and is built where torch builds
        return importlib.import_module("sglang.srt.layers.rotary_embedding.factory").get_rope(**given)

    return get_rope_cpu


def _probe() -> None:
    get_rope_wrapper = importlib.import_module("sglang.srt.layers.rotary_embedding.factory").get_rope_wrapper
    rope = get_rope_wrapper(2, rotary_dim=2, max_position=4, base=10000, is_neox_style=False, device="cpu")
    turned, _ = rope(torch.tensor([1]), torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 2))
    assert torch.allclose(turned, torch.tensor([0.5403023, 0.8414710])), turned  # cosine and sine of 1


PATCH = Patch(
    id="p104-plain-rotary-of-latent-attention",
    library="sglang",
    target="sglang.srt.layers.rotary_embedding.factory:get_rope_cpu",
    kind="wrap",
    why="a DeepSeek model without yarn cannot be built on a CPU: AssertionError on rope_scaling",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="get_rope_cpu takes rope_scaling=None",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_plain_rotary_of_latent_attention_is_refused_on_a_cpu_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
