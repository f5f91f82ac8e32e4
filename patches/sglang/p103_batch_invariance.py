"""SGLang's batch-invariant mode on a CPU: a row's product does not depend on how many other rows there are.

The BLAS behind torch takes other kernels for one, two and three rows than for more, and these add up in another order;
from four rows on all row counts agree, whatever the position of the row (tests/sglang/test_patches.py). So short matrices
are filled up with zero rows. A batch of matrices, one for each head of latent attention, is multiplied one by one. And torch's
sigmoid takes its last few numbers through another exp than the others, so those of a router are filled up to whole vectors.
The torch_native attention goes through the sequences one by one and needs nothing.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator

MIN_ROWS = 16  # four would do on the machines seen; a margin costs nothing measurable
WHOLE = 64  # numbers; torch takes two vectors at a time, which are 32 floats with AVX-512
_INSTALLED: list[torch.library.Library] = []  # a Library withdraws its kernels when it is collected


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with at least MIN_ROWS rows. `out=` leads to another operator, and so past this one."""
    rows = a.shape[0]
    if rows < MIN_ROWS:
        a = pad(a, (0, 0, 0, MIN_ROWS - rows))
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))[:rows]


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * (a @ b), the product by `mm`."""
    return torch.add(mm(a, b) * alpha, bias, alpha=beta)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a[i] @ b[i] for every i, each by `mm`."""
    return torch.stack([mm(left, right) for left, right in zip(a, b, strict=True)])


def bmm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """`bmm` into `out`, which may have any strides."""
    return out.copy_(bmm(a, b))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of x filled up to whole vectors."""
    flat = pad(x.flatten(), (0, -x.numel() % WHOLE))
    return torch.sigmoid(flat, out=torch.empty_like(flat))[: x.numel()].view(x.shape)


def _make(original: Callable[..., None]) -> Callable[..., None]:
    def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
        if _INSTALLED:
            return
        library = torch.library.Library("aten", "IMPL")
        for name, kernel in (("mm", mm), ("addmm", addmm), ("bmm", bmm), ("bmm.out", bmm_out), ("sigmoid", sigmoid)):
            library.impl(name, kernel, "CPU")
        _INSTALLED.append(library)

    return enable_batch_invariant_mode


def _probe() -> None:
    enable = importlib.import_module("sglang.srt.batch_invariant_ops").enable_batch_invariant_mode
    assert getattr(enable, "__rpp_patch__", None) == PATCH.id, enable


PATCH = Patch(
    id="p103-batch-invariance",
    library="sglang",
    target="sglang.srt.batch_invariant_ops.batch_invariant_ops:enable_batch_invariant_mode",
    kind="wrap",
    why="deterministic inference refuses a CPU (No supported accelerator), so two seeded runs would differ in their last bits",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="get_dispatch_device_backend knows the CPU",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_deterministic_mode_refuses_a_cpu_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
