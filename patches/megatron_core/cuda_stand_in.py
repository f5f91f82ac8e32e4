"""A `torch` whose CUDA is the CPU: the real module, with the few names overlaid that would need a device."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")
_LIKE = ("empty", "full", "ones", "rand", "randint", "randn", "zeros")
FACTORIES = (*_LIKE, *(f"{name}_like" for name in _LIKE), "arange", "as_tensor", "eye", "linspace", "randperm", "tensor")


class Overlay(ModuleType):
    """A module that answers some names itself and hands every other one to the real module, each time anew."""

    def __init__(self, real: ModuleType, names: dict[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(names, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class Stream:
    """Work on the CPU has happened when the call returns, so there is nothing to order."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = nothing

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True


class Event(Stream):
    """Remembers when it was made or last recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.record()

    def record(self, *_: Any) -> None:
        self._time_s = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end._time_s - self._time_s) * 1e3

    wait = Stream.nothing


def is_cuda(device: Any) -> bool:
    """Whether a `device=` argument means a CUDA device, with torch's own readings of strings and integers."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def on_cpu(factory: Callable) -> Callable:
    """A tensor factory that takes the CPU for a CUDA device, and pageable for pinned memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def cuda_names() -> dict[str, Any]:
    """The names of torch.cuda that training, checkpointing and offloading call. `is_available` is not one of them."""
    stream = Stream()
    generator = torch.random.default_generator

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        generator.set_state(state)

    return {
        **dict.fromkeys(("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats"), nothing),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda *_: 0),
        **dict.fromkeys(("current_stream", "default_stream"), lambda *_: stream),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), generator.manual_seed),
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda *_: defaultdict(int),
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "random": Overlay(torch.cuda.random, {"get_rng_state": get_rng_state, "set_rng_state": set_rng_state}),
        "nvtx": Overlay(torch.cuda.nvtx, dict.fromkeys(("range_push", "range_pop", "mark"), nothing)),
    }


def torch_on_cpu() -> Overlay:
    """The `torch` that megatron.* modules are given."""
    return Overlay(torch, {name: on_cpu(getattr(torch, name)) for name in FACTORIES} | {"cuda": Overlay(torch.cuda, cuda_names())})
