"""Small, versioned, self-proving changes to the libraries megatron_rpp runs on. See README.md for the list.

import megatron_rpp_patches
megatron_rpp_patches.apply("megatron_core")    # before any import of megatron; no-op where CUDA is there
...
megatron_rpp_patches.verify("megatron_core")   # after the imports: every patch stands and its probe passes
"""

from __future__ import annotations

import pkgutil

from megatron_rpp_patches._core import apply, report, undo, verify
from megatron_rpp_patches._record import Patch

__all__ = ["Patch", "apply", "report", "set_names", "undo", "verify"]


def set_names() -> tuple[str, ...]:
    """The sets of patches there are, one sub-package each."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.ispkg))
