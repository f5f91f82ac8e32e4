"""Small, versioned, self-proving changes to the libraries megatron_rpp runs on. README.md lists them.

In every process, before the library is imported, `apply("megatron_core")`; processes that multiprocessing starts from
there on do the same by themselves. `verify("megatron_core")` imports what is left, and raises unless every patch stands
and its probe passes. `report()` says what is active and why the rest is not.
"""

from __future__ import annotations

import pkgutil

from megatron_rpp_patches._core import apply, report, undo, verify
from megatron_rpp_patches._record import Patch

__all__ = ["Patch", "apply", "report", "set_names", "undo", "verify"]


def set_names() -> tuple[str, ...]:
    """The sets of patches there are, one sub-package each."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.ispkg))
