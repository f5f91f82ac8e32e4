"""Fused element-wise functions run eagerly."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda


def _eager(_: Any) -> Callable:
    from megatron.core import jit

    return jit.noop_decorator


def _probe() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"), "swiglu is compiled"


PATCHES = (
    Patch(
        id="p010-jit-fuser",
        library="megatron-core",
        target="megatron.core.jit:jit_fuser",
        kind="value",
        source="megatron.core.jit",
        why="torch.compile makes the first step on a CPU take 24 s in place of 0.1 s, for the same numbers",
        upstream="not reported: jit.disable_jit_fuser() exists, but acts only before the decorated modules are imported",
        versions="==0.16.1",
        remove_when="jit_fuser can be chosen by a setting",
        expires=datetime.date(2027, 11, 30),
        probe=_probe,
        test="tests/patches/test_necessity.py::test_without_the_patch[p010-jit-fuser]",
        make=_eager,
        inactive=has_cuda,
    ),
)
