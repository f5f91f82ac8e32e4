"""The rotary embedding takes SGLang's plain torch path on any CPU.

SGLang's `is_cpu()` is True only with SGLANG_USE_CPU_ENGINE=1, which in turn demands the AMX build of sgl-kernel. Without
it the rotary layer believes in an unknown accelerator and imports vllm for a kernel that it never calls on a CPU.
"""

from __future__ import annotations

import datetime
import importlib

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator


def _probe() -> None:
    module = importlib.import_module("sglang.srt.layers.rotary_embedding.base")
    assert module._is_cpu is True, module._is_cpu


PATCH = Patch(
    id="p101-rotary-on-cpu",
    library="sglang",
    target="sglang.srt.layers.rotary_embedding.base:_is_cpu",
    kind="value",
    why="a model with rotary positions cannot be built on a CPU: No module named 'vllm'",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="RotaryEmbedding.__init__ asks for the device it is built on",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_rotary_layer_wants_vllm_on_a_cpu_without_the_patch",
    make=lambda original: True,
    source="sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.__init__",
    inactive=has_accelerator,
)
