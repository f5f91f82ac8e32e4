"""Block-FP8 models whose other layers compute in float32, on a CPU.

SGLang allows bfloat16 and float16 beside FP8. A run without a GPU is in float32, and its roll-outs should differ from it by
the quantisation and by nothing else.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator


def _make(original: Any) -> Callable[[Any], list[torch.dtype]]:
    def get_supported_act_dtypes(config: Any) -> list[torch.dtype]:
        return [*original.__func__(type(config)), torch.float32]

    return get_supported_act_dtypes


def _probe() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    found = Fp8Config().get_supported_act_dtypes()
    assert torch.float32 in found, found
    assert torch.bfloat16 in found, found


PATCH = Patch(
    id="p108-fp8-in-float32",
    library="sglang",
    target="sglang.srt.layers.quantization.fp8:Fp8Config.get_supported_act_dtypes",
    kind="wrap",
    why="a float32 engine with FP8 weights is refused: torch.float32 is not supported for quantization method fp8",
    upstream="not reported: no kernel of SGLang's for FP8 writes float32",
    versions=">=0.5.21,<0.5.22",
    remove_when="Fp8Config names torch.float32",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_fp8_beside_float32_is_refused_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
