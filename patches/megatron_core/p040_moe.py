"""Mixture of experts without Transformer Engine and without CUDA."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda, has_transformer_engine

MODULE = "megatron.core.transformer.moe.moe_utils"
COMMON = {"library": "megatron-core", "versions": "==0.16.1", "expires": datetime.date(2027, 11, 30)}


def _numpy_when_asked(original: Callable) -> Callable:
    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    return maybe_move_tensor_to_cpu


def _probe_router() -> None:
    import torch
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    x, weight = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    logits = router_gating_linear(x, weight, None, torch.float32)
    logits.sum().backward()
    assert torch.equal(logits, weight.t()), logits
    assert torch.equal(weight.grad, torch.ones(2, 2)), weight.grad


def _probe_numpy() -> None:
    import torch
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    assert maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True).tolist() == [1, 2]
    assert type(maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)).__module__ == "numpy"
    assert torch.is_tensor(maybe_move_tensor_to_cpu(torch.tensor([1, 2])))


PATCHES = (
    Patch(
        **COMMON,
        id="p040-moe-router",
        target=f"{MODULE}:te_general_gemm",
        kind="value",
        source=f"{MODULE}:RouterGatingLinearFunction",
        why="every router dies with NameError te_general_gemm; None is the value its code tests for",
        upstream="not reported: the except branch of the import sets HAVE_TE only",
        remove_when="moe_utils sets te_general_gemm to None in that branch",
        probe=_probe_router,
        test="tests/patches/test_necessity.py::test_without_the_patch[p040-moe-router]",
        make=lambda _: None,
        inactive=has_transformer_engine,
    ),
    Patch(
        **COMMON,
        id="p041-moe-splits",
        target=f"{MODULE}:maybe_move_tensor_to_cpu",
        kind="wrap",
        why="as_numpy is forgotten for a tensor that is on the CPU already: all_to_all gets tensors as split sizes",
        upstream="not reported: upstream supports CUDA only",
        remove_when="as_numpy is obeyed for CPU tensors",
        probe=_probe_numpy,
        test="tests/patches/test_necessity.py::test_without_the_patch[p041-moe-splits]",
        make=_numpy_when_asked,
        inactive=has_cuda,
    ),
)
