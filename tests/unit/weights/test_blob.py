"""The bytes of a checkpoint's tensors while they wait to be written."""

from __future__ import annotations

import gc
import io
import sys

import pytest
import torch

from megatron_rpp.weights.convert import _blob


def test_a_blob_is_what_torch_load_reads() -> None:
    value = torch.arange(1000)
    blob = _blob(value)
    assert type(blob) is bytes
    assert torch.equal(torch.load(io.BytesIO(blob)), value)


def test_a_blob_that_a_traceback_keeps_in_a_cycle_can_be_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of a BytesIO in its place raises when it is collected, and crashes Python 3.12.1."""
    gc.collect()
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    cycle: list[object] = [_blob(torch.arange(1000))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert unraisable == []
