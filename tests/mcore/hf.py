"""transformers, importable beside any build of torch."""

from __future__ import annotations

from types import ModuleType

from megatron_rpp_patches.sglang.p100_torchvision_schemas import PATCH


def transformers() -> ModuleType:
    """The module. Its text models import torchvision, which p100 makes importable where its C++ part cannot load."""
    if PATCH.inactive() is None:
        PATCH.enable()
    import transformers

    return transformers
