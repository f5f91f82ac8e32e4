"""Megatron's CUDA generator is torch's CPU generator."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda

MODULE = "megatron.core.tensor_parallel.random"
COMMON = {
    "library": "megatron-core",
    "upstream": "not reported: upstream supports CUDA only",
    "versions": "==0.16.1",
    "remove_when": "megatron-core takes its device from a setting",
    "expires": datetime.date(2027, 11, 30),
    "inactive": has_cuda,
}


def _set_state(_: Callable) -> Callable:
    from megatron.core.tensor_parallel import random

    def _set_cuda_rng_state(new_state, device=-1, graph_safe=False):
        # the original queues the work until CUDA starts, which it never does
        random.torch.cuda.set_rng_state(new_state)

    return _set_cuda_rng_state


def _probe_state() -> None:
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    before = torch.get_rng_state()
    tracker = CudaRNGStatesTracker()
    tracker.add("probe", 5)
    with tracker.fork("probe"):
        first = torch.rand(3)
    with tracker.fork("probe"):
        second = torch.rand(3)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat([first, second]), expected), "a fork draws from its own stream, on from where it stopped"
    assert torch.equal(before, after), "a fork leaves the default stream where it was"


class _OneGenerator(logging.Filter):
    """`fork` warns when the CPU generator moves while CUDA's is forked. Here they are one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


_FILTER = _OneGenerator()


def _probe_filter() -> None:
    assert _FILTER in logging.getLogger(MODULE).filters


PATCHES = (
    Patch(
        **COMMON,
        id="p020-rng-state",
        target=f"{MODULE}:_set_cuda_rng_state",
        kind="replace",
        why="the state of the tensor-parallel stream is never set: every rank initialises and drops out alike",
        probe=_probe_state,
        test="tests/patches/test_necessity.py::test_without_the_patch[p020-rng-state]",
        make=_set_state,
    ),
    Patch(
        **COMMON,
        id="p021-rng-warning",
        target=f"{MODULE}:getLogger",
        kind="hook",
        why="one warning for each fork, thousands a step, about generators that are one here",
        probe=_probe_filter,
        test="tests/patches/test_necessity.py::test_without_the_patch[p021-rng-warning]",
        enable=lambda: logging.getLogger(MODULE).addFilter(_FILTER),
        disable=lambda: logging.getLogger(MODULE).removeFilter(_FILTER),
    ),
)
