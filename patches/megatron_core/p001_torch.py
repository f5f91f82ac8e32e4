"""megatron.* modules, and they alone, see a torch whose CUDA is the CPU."""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_rpp_patches._core import WATCHER
from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda

COMMON = {
    "library": "megatron-core",
    "kind": "hook",
    "upstream": "not reported: upstream supports CUDA only",
    "versions": "==0.16.1",
    "remove_when": "megatron-core takes its device from a setting",
    "expires": datetime.date(2027, 11, 30),
    "inactive": has_cuda,
}


@functools.cache
def _overlay() -> ModuleType:
    from megatron_rpp_patches.megatron_core.cuda_stand_in import torch_on_cpu

    return torch_on_cpu()


def _give(module: ModuleType) -> None:
    if vars(module).get("torch") is sys.modules.get("torch", module):
        module.torch = _overlay()


def _show() -> None:
    WATCHER.watch("megatron", _give, subtree=True)


def _hide() -> None:
    WATCHER.forget(_give)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and getattr(vars(module).get("torch"), "_real", None) is sys.modules["torch"]:
            module.torch = sys.modules["torch"]


def _probe_overlay() -> None:
    import torch
    from megatron.core import parallel_state, utils

    assert not torch.cuda.is_available(), "torch itself must stay as it is"
    assert utils.torch.cuda.current_device() == torch.device("cpu"), utils.torch.cuda.current_device()
    assert parallel_state.torch.zeros(1, device="cuda").device.type == "cpu", "factories must take the CPU"


def _for_megatron(original: Callable, stand_in: Callable) -> Callable:
    """A method that does something else when the calling code is in a megatron.* module."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return stand_in(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    method.__rpp_patch__ = "p002-tensor-methods"
    return method


def _itself(_: Callable, self: Any, *__: Any, **___: Any) -> Any:
    return self


def _cuda_type(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.type()` names the CUDA class, by which Megatron's optimisers sort their parameters."""
    answer = original(self, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and "cuda" not in answer else answer


def _set_methods(torch: ModuleType) -> None:
    torch.Tensor.cuda = _for_megatron(torch.Tensor.cuda, _itself)
    torch.Tensor.type = _for_megatron(torch.Tensor.type, _cuda_type)
    torch.nn.Module.cuda = _for_megatron(torch.nn.Module.cuda, _itself)


def _unset_methods() -> None:
    WATCHER.forget(_set_methods)
    torch = sys.modules.get("torch")
    if torch is not None:
        del torch.Tensor.cuda, torch.Tensor.type  # both are inherited from the C++ base
        torch.nn.Module.cuda = torch.nn.Module.cuda.__wrapped__


def _probe_methods() -> None:
    import torch

    as_megatron = {"__name__": "megatron.probe", "x": torch.zeros(1), "m": torch.nn.Identity()}
    assert torch.zeros(1).type() == "torch.FloatTensor", "everyone else gets torch's own answer"
    assert eval("x.type()", as_megatron) == "torch.cuda.FloatTensor"  # noqa: S307 (the caller's module is what is probed)
    assert eval("x.cuda() is x and m.cuda() is m", as_megatron)  # noqa: S307


PATCHES = (
    Patch(
        **COMMON,
        id="p001-torch-overlay",
        target="megatron:torch",
        why="254 lines name a CUDA device; without this the first is tensor_parallel/random.py manual_seed",
        probe=_probe_overlay,
        test="tests/patches/test_necessity.py::test_without_the_patch[p001-torch-overlay]",
        enable=_show,
        disable=_hide,
    ),
    Patch(
        **COMMON,
        id="p002-tensor-methods",
        target="torch:Tensor.cuda Tensor.type nn.Module.cuda",
        why="methods of tensors are out of the overlay's reach: rotary offsets call .cuda(), optimisers and clip_grads compare .type()",
        probe=_probe_methods,
        test="tests/patches/test_necessity.py::test_without_the_patch[p002-tensor-methods]",
        enable=lambda: WATCHER.watch("torch", _set_methods),
        disable=_unset_methods,
    ),
)
