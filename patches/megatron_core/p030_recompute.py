"""Selective recomputation without Transformer Engine."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_transformer_engine


def _no_fp8_by_default(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self, fp8=None):
        original(self, fp8=fp8 or None)  # the original takes every value but None, its own default False included, for fp8

    return init


def _probe() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    assert not CheckpointWithoutOutput().fp8
    assert CheckpointWithoutOutput(fp8="hybrid").fp8


PATCHES = (
    Patch(
        id="p030-recompute-fp8",
        library="megatron-core",
        target="megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
        kind="wrap",
        why="recompute_modules layernorm and mlp die with NameError FP8GlobalStateManager",
        upstream="not reported: `self.fp8 = fp8 is not None` with default fp8=False",
        versions="==0.16.1",
        remove_when="CheckpointWithoutOutput().fp8 is False upstream",
        expires=datetime.date(2027, 11, 30),
        probe=_probe,
        test="tests/patches/test_necessity.py::test_without_the_patch[p030-recompute-fp8]",
        make=_no_fp8_by_default,
        inactive=has_transformer_engine,
    ),
)
