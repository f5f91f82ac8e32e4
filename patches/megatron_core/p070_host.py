"""Refuse a host on which Megatron-Core would hang or not import, before anything starts."""

from __future__ import annotations

import datetime
import importlib.util

from megatron_rpp.errors import PatchError
from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_cuda


def _need_psutil() -> None:
    if importlib.util.find_spec("psutil") is None:
        raise PatchError(
            "psutil is missing (target megatron.core.dist_checkpointing)",
            where="patch p070-psutil",
            expected="psutil, which megatron-core needs and does not declare",
            got="not installed: the writer process dies and the save waits for it for ever",
            fix="pip install psutil",
        )


def _refuse_transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        raise PatchError(
            "Transformer Engine is installed without a CUDA device (target megatron.core)",
            where="patch p071-no-transformer-engine",
            expected="no transformer-engine on this host",
            got="a package that raises RuntimeError when Megatron-Core imports it",
            fix="pip uninstall transformer-engine",
        )


PATCHES = (
    Patch(
        id="p070-psutil",
        library="megatron-core",
        target="psutil",
        kind="hook",
        why="dist_checkpointing without psutil hangs a save for ever",
        upstream="not reported: filesystem_async.py imports psutil in a try, then calls it",
        versions="==0.16.1",
        remove_when="megatron-core declares psutil",
        expires=datetime.date(2027, 11, 30),
        probe=_need_psutil,
        test="tests/patches/test_host.py::test_a_checkpoint_writer_dies_without_psutil",
        enable=_need_psutil,
        disable=lambda: None,
    ),
    Patch(
        id="p071-no-transformer-engine",
        library="megatron-core",
        target="transformer_engine",
        kind="hook",
        why="its wheel raises RuntimeError, not ImportError, where CUDA is missing: no megatron module can be imported",
        upstream="not reported: Megatron-Core catches ImportError only",
        versions="==0.16.1",
        remove_when="transformer_engine can be imported without CUDA",
        expires=datetime.date(2027, 11, 30),
        probe=_refuse_transformer_engine,
        test="tests/patches/test_host.py::test_megatron_cannot_be_imported_beside_a_broken_transformer_engine",
        enable=_refuse_transformer_engine,
        disable=lambda: None,
        inactive=has_cuda,
    ),
)
