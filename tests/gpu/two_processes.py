"""Buckets from one process to another through GPU memory. `python -m tests.gpu.two_processes` prints a JSON object.

The writer starts the reader, sends it BUCKETS buckets from two slots in turn, and compares what the reader saw of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import torch
from torch import Tensor

from megatron_rpp.rollout import device_memory
from megatron_rpp.rollout.device_memory import CudaDriver, DeviceOutbox

BUCKETS = 20
SLOT_BYTES = 64 * 2**20
VISIBLE = "RPP_READER_GPUS"  # CUDA_VISIBLE_DEVICES of the reader


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def used_bytes(device: int = 0) -> int:
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def read() -> None:
    """Copies every bucket into memory of its own, on its GPU, and says what it then has; the last word is what is in use."""
    own: dict[str, Tensor] = {}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            for name, tensor in device_memory.unpack(order):
                own.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
            torch.cuda.synchronize()
            answer = {"digest": digest(own), "used": used_bytes(), "device": str(next(iter(own.values())).device)}
        except Exception as error:  # noqa: BLE001 the writer prints it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def write() -> None:
    """Fills slots as an exchange would, on a stream of its own, and tells the reader where things lie."""
    device = torch.device("cuda", 0)
    outbox = DeviceOutbox(CudaDriver(device))
    slots = [outbox.empty(SLOT_BYTES) for _ in range(2)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get(VISIBLE, os.environ.get("CUDA_VISIBLE_DEVICES", "0"))}
    env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    line = [sys.executable, "-m", "tests.gpu.two_processes", "read"]
    reader = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    equal, used, answers = [], [], []
    torch.manual_seed(0)
    for number in range(BUCKETS):
        slot = slots[number % 2]
        matrix = slot[: 2**25].view(torch.bfloat16).view(4096, 4096)
        scale = slot[2**25 : 2**25 + 4096].view(torch.float32).view(32, 32)
        matrix.copy_(torch.randn(4096, 4096, device=device))
        scale.copy_(torch.randn(32, 32, device=device))
        bucket = {"matrix": matrix, "scale": scale, "outside": torch.randn(1000, device=device)}
        reader.stdin.write(json.dumps(outbox.pack(list(bucket.items()))) + "\n")
        reader.stdin.flush()
        answers.append(json.loads(reader.stdout.readline()))
        if "error" in answers[-1]:
            break
        equal.append(answers[-1]["digest"] == digest(bucket))
        used.append(answers[-1]["used"])
    reader.stdin.close()
    code = reader.wait(60)
    print(json.dumps({"equal": equal, "used": used, "code": code, "last": answers[-1]}))


if __name__ == "__main__":
    read() if sys.argv[1:] == ["read"] else write()
