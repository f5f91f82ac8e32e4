"""Tensors that stay on their device: what is described, opened, closed and copied. Between real processes, but on a host's memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout import device_memory, memory
from megatron_rpp.rollout.device_memory import DeviceOutbox, Inbox, open_outbox
from tests.sglang.shared_driver import UUID, SharedDriver, Unshared

READER = """
import json, sys
from megatron_rpp.rollout.device_memory import Inbox
from tests.sglang.shared_driver import SharedDriver
driver = SharedDriver()
inbox = Inbox({driver.uuid: driver}.__getitem__)
for line in sys.stdin:
    found = {name: [str(t.dtype), list(t.shape), t.double().flatten().tolist()] for name, t in inbox.unpack(json.loads(line))}
    print(json.dumps([found, driver.opened, len(driver.held)]), flush=True)
"""
BUCKETS = 20


def described(bucket: list[tuple[str, torch.Tensor]]) -> dict:
    return {name: [str(t.dtype), list(t.shape), t.double().flatten().tolist()] for name, t in bucket}


@contextmanager
def reader() -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield process
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str], order: dict) -> tuple[dict, int, int]:
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return tuple(json.loads(process.stdout.readline()))


def test_a_slot_is_read_where_it_lies_and_opened_once_for_all_buckets() -> None:
    """Two slots in turn, as a staging has them; then other slots, and a second reader, as after an engine's restart."""
    driver = SharedDriver()
    outbox = DeviceOutbox(driver)
    slots = [outbox.empty(4096), outbox.empty(4096)]
    with reader() as process:
        for number in range(BUCKETS):
            slot = slots[number % 2]
            row = slot[64:164].view(torch.bfloat16).view(10, 5)
            row.copy_(torch.randn(10, 5))
            wide = slot[192:1192].view(torch.float64).view(5, 25)
            wide.copy_(torch.randn(5, 25))
            bucket = [("row", row), ("wide", wide)]
            order = outbox.pack(bucket)
            assert len({place[0] for *_, place in order["tensors"]}) == 1
            assert [place[1] for *_, place in order["tensors"]] == [64, 192], "described where they lie, not copied"
            assert driver.synchronised == number + 1
            assert ask(process, order) == (described(bucket), 3, 3)
        with reader() as restarted:
            assert ask(restarted, order) == (described(bucket), 3, 3)
        del slots, slot, row, wide, bucket
        gc.collect()
        assert len(driver.held) == 1, "memory is given back with its last view"
        fresh = outbox.empty(512)
        fresh.fill_(7)
        bucket = [("fresh", fresh)]
        assert ask(process, outbox.pack(bucket)) == (described(bucket), 4, 2), "what the writer gave back is closed here too"
    outbox.close()
    del fresh, bucket
    gc.collect()
    assert driver.held == {}


def test_what_lies_elsewhere_is_brought_in_whatever_its_type_and_shape() -> None:
    driver = SharedDriver()
    outbox = DeviceOutbox(driver)
    slot = outbox.empty(256)
    slot.copy_(torch.arange(256, dtype=torch.uint8))
    bucket = [
        ("inside", slot[8:24].view(2, 8)),
        ("columns", slot.view(16, 16)[:, 3:5]),
        ("odd", torch.randn(3, 5, dtype=torch.bfloat16)),
        ("scalar", torch.tensor(1.5)),
        ("empty", torch.empty(0, 4)),
        ("eighth", torch.randn(9).to(torch.float8_e4m3fn)),
        ("large", torch.randn(1000, 300, dtype=torch.float64)),  # more than the first region has
    ]
    held = []
    with reader() as process:
        for part in (bucket[:5], bucket, [], bucket[::-1]):
            order = outbox.pack(part)
            held.append(len(driver.held))
            assert ask(process, order) == (described(part), 3 if held[1:] else 2, 2)
    assert held == [2, 3, 2, 2], "what was outgrown is given back only when the reader has closed it"


def test_a_view_keeps_its_region_open_after_the_inbox_has_closed() -> None:
    writer, driver = SharedDriver(), SharedDriver()
    outbox, inbox = DeviceOutbox(writer), Inbox({UUID: driver}.__getitem__)
    kept = dict(inbox.unpack(outbox.pack([("a", torch.full((1000,), 3.0))])))["a"]
    inbox.close()
    assert kept.sum().item() == 3000
    open_now = len(driver.held)
    del kept
    gc.collect()
    assert (open_now, len(driver.held), driver.opened, driver.closed) == (1, 0, 1, 1)


def test_a_gpu_that_the_reader_does_not_see_is_named() -> None:
    order = DeviceOutbox(SharedDriver()).pack([("a", torch.ones(1))])
    with pytest.raises(EngineError, match=f"(?s)does not see.*expected: GPU {UUID} in CUDA_VISIBLE_DEVICES"):
        list(device_memory.unpack(order))


def test_where_memory_cannot_be_shared_the_host_carries_it_after_one_warning() -> None:
    warnings: list[str] = []
    driver, device = Unshared(), torch.device("cuda", 0)
    outbox = open_outbox(device, warn=warnings.append, driver_of=lambda _: driver)
    assert isinstance(outbox, memory.Outbox)
    assert len(warnings) == 1
    assert "host memory" in warnings[0]
    assert "cuIpcGetMemHandle failed" in warnings[0]
    gc.collect()
    assert driver.held == {}, "the memory that it tried with is given back"
    order = outbox.pack([("a", torch.full((3,), 2.0))])
    assert dict(device_memory.unpack(order))["a"].tolist() == [2.0] * 3
    assert isinstance(open_outbox(device, warn=warnings.append, driver_of=lambda _: SharedDriver()), DeviceOutbox)
    assert isinstance(open_outbox(torch.device("cpu"), warn=warnings.append), memory.Outbox)
    assert len(warnings) == 1
