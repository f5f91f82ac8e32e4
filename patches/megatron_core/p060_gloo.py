"""Collectives on gloo give the right answer for tensors that are not contiguous."""

from __future__ import annotations

import datetime
import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron_rpp.errors import RppError
from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda

MODULE = "torch.distributed.distributed_c10d"


def _is_spoiled(value: Any) -> bool:
    """A tensor whose memory gloo would read or write in the wrong order. CPU tensors travel by gloo; other devices do not."""
    import torch

    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided and not value.is_contiguous()


def _through_contiguous(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        if not any(_is_spoiled(item) for value in values for item in (value if isinstance(value, (list, tuple)) else (value,))):
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        _refuse_deferred(original.__name__, bound.arguments)
        return _run_on_copies(original, bound)

    return collective


def _refuse_deferred(name: str, arguments: dict[str, Any]) -> None:
    """What runs later cannot be copied back now."""
    from torch.distributed import distributed_c10d

    group = arguments.get("group") or distributed_c10d._get_default_group()
    if arguments.get("async_op") or group in distributed_c10d._world.pg_coalesce_state:
        raise RppError(
            "gloo would corrupt this tensor without a word",
            where=f"torch.distributed.{name}",
            expected="contiguous tensors for async_op=True and inside a coalescing manager",
            got="a tensor that is not contiguous",
            fix="pass tensor.contiguous(), or drop async_op",
        )


def _run_on_copies(original: Callable, bound: inspect.BoundArguments) -> Any:
    import torch

    copies: list[tuple[Any, Any]] = []

    def contiguous(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [contiguous(item) for item in value]
        if not _is_spoiled(value):
            return value
        copies.append((value, value.contiguous()))
        return copies[-1][1]

    for name, value in bound.arguments.items():
        bound.arguments[name] = contiguous(value)
    result = original(*bound.args, **bound.kwargs)
    with torch.no_grad():
        for value, copy in copies:
            value.copy_(copy)  # inputs are unchanged, so this touches outputs only
    return result


def _probe(name: str) -> None:
    import torch.distributed

    assert getattr(torch.distributed, name) is getattr(torch.distributed.distributed_c10d, name), "torch.distributed holds another function"


def _patch(number: int, name: str) -> Patch:
    return Patch(
        id=f"p06{number}-gloo-{name.replace('_', '-')}",
        library="torch",
        target=f"{MODULE}:{name}",
        kind="wrap",
        why="gloo takes strided memory for flat memory: wrong numbers, no error",
        upstream="not reported: the gloo process group checks is_contiguous in send, recv and all_to_all inputs only",
        versions="==2.13.0",
        remove_when="ProcessGroupGloo refuses or copies tensors that are not contiguous",
        expires=datetime.date(2027, 11, 30),
        probe=lambda: _probe(name),
        test=f"tests/patches/test_gloo.py::test_gloo_is_wrong_about_strided_tensors_without_the_patch[{name}]",
        make=_through_contiguous,
        inactive=has_cuda,
    )


NAMES = ("broadcast", "all_reduce", "reduce", "scatter", "reduce_scatter", "all_to_all_single")
PATCHES = tuple(_patch(number, name) for number, name in enumerate(NAMES))
