"""Tensors through shared memory, between real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from megatron_rpp.rollout.memory import Outbox, unpack

READER = """
import json, sys, torch
from megatron_rpp.rollout.memory import unpack
for line in sys.stdin:
    found = {name: tensor for name, tensor in unpack(json.loads(line))}
    print(json.dumps({name: [str(t.dtype), list(t.shape), t.double().flatten().tolist()] for name, t in found.items()}), flush=True)
    for tensor in found.values():
        tensor.zero_()
"""


def _described(bucket: list[tuple[str, torch.Tensor]]) -> dict:
    return {name: [str(t.dtype), list(t.shape), t.double().flatten().tolist()] for name, t in bucket}


def test_tensors_of_any_type_and_shape_arrive_and_a_reader_cannot_change_them() -> None:
    first = [
        ("odd", torch.randn(3, 5, dtype=torch.bfloat16)),
        ("scalar", torch.tensor(1.5)),
        ("empty", torch.empty(0, 4)),
        ("bytes", torch.arange(7, dtype=torch.uint8)),
        ("double", torch.randn(2, 2, dtype=torch.float64)),
        ("transposed", torch.randn(4, 6).T),
        ("eighth", torch.randn(9).to(torch.float8_e4m3fn)),
    ]
    larger = [("large", torch.randn(300, 100)), ("small", torch.randn(1))]
    outbox = Outbox()
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    for bucket in (first, larger, first, []):
        order = outbox.pack(bucket)
        reader.stdin.write(json.dumps(order) + "\n")
        reader.stdin.flush()
        assert json.loads(reader.stdout.readline()) == _described(bucket)
        assert _described(list(unpack(order))) == _described(bucket)
    reader.stdin.close()
    assert reader.wait(30) == 0
    outbox.close()


def test_a_mapping_lives_as_long_as_a_tensor_looks_into_it() -> None:
    outbox = Outbox()
    kept = dict(unpack(outbox.pack([("a", torch.full((1000,), 3.0))])))["a"]
    outbox.close()
    assert kept.sum().item() == 3000
