"""torchvision's CUDA wheel imports on a CPU build of torch.

PyPI has one torchvision wheel, built for CUDA. Its C++ part cannot load without libcudart, so the operators that its
Python part registers fake kernels for were never declared, and `import torchvision` raises. SGLang imports transformers,
which imports torchvision for image models that no run here uses. Declaring the two schemas is enough.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
from pathlib import Path

import torch

from megatron_rpp_patches._record import Patch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_DECLARED: list[torch.library.Library] = []  # a Library withdraws its schemas when it is collected


def _inactive() -> str | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "torchvision is not installed"
    if hasattr(torch.ops.torchvision, "nms"):
        return "torchvision's operators are declared"
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            return None
        return "torchvision's C++ part loads"
    return None


def _enable() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _DECLARED.append(library)


def _disable() -> None:
    while _DECLARED:
        _DECLARED.pop()._destroy()


def _probe() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        raise AssertionError(f"torchvision cannot be imported: {error}") from error


PATCH = Patch(
    id="p100-torchvision-schemas",
    library="torchvision",
    target="torchvision:_meta_registrations",
    kind="hook",
    why="import of sglang fails on a CPU build of torch: operator torchvision::nms does not exist",
    upstream="not reported: by design, the wheels for CPUs are on download.pytorch.org only",
    versions=">=0.28,<0.29",
    remove_when="PyPI's torchvision imports without CUDA, or sglang does not import torchvision",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_sglang_cannot_be_imported_without_the_torchvision_schemas",
    enable=_enable,
    disable=_disable,
    inactive=_inactive,
)
