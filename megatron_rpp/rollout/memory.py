"""Tensors handed to another process of this host without copying them through a socket.

The writer keeps one anonymous memory file (memfd) and says where in it each tensor lies; the reader opens the file through
/proc. Nothing has a name in a file system, so nothing is left behind however a process ends, and /dev/shm may be small.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64
Bucket = Sequence[tuple[Any, Tensor]]  # names are whatever json can carry


class Outbox:
    """The writer's end. One bucket at a time: packing the next one overwrites the last."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("rpp-weights", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None

    def empty(self, num_bytes: int, device: torch.device) -> Tensor:
        """Memory to receive in, uint8 [num_bytes]: any will do here, since `pack` copies."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def pack(self, bucket: Bucket) -> dict[str, Any]:
        """Copy the tensors in and describe them, for `unpack` in any process of this user on this host.

        Shapes: any, on any device, made contiguous on the way.
        """
        offsets, num_bytes = offsets_of([tensor for _, tensor in bucket])
        flat = self._flat(num_bytes)
        entries = []
        for (name, tensor), offset in zip(bucket, offsets, strict=True):
            view(flat, tensor.dtype, list(tensor.shape), offset).copy_(tensor.detach())
            entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset])
        return {"path": f"/proc/{os.getpid()}/fd/{self._fd}", "num_bytes": num_bytes, "tensors": entries}

    def _flat(self, num_bytes: int) -> Tensor:
        """The first bytes of the file, which grows when it must."""
        if self._memory is None or len(self._memory) < num_bytes:
            os.ftruncate(self._fd, max(num_bytes, mmap.PAGESIZE))
            self._memory = mmap.mmap(self._fd, max(num_bytes, mmap.PAGESIZE))
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def close(self) -> None:
        """Give the memory back. Readers that still look into it keep what they see."""
        self._memory = None
        os.close(self._fd)


def unpack(bucket: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a description, as views of the writer's memory, private to this process if written to."""
    with open(bucket["path"], "rb") as file:
        memory = mmap.mmap(file.fileno(), max(bucket["num_bytes"], 1), prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)  # holds the mapping, as every view of it does
    for name, dtype, shape, offset in bucket["tensors"]:
        yield name, view(flat, getattr(torch, dtype), shape, offset)


def offsets_of(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where tensors lie in one buffer, each aligned for any dtype; and the bytes of the buffer."""
    offsets, num_bytes = [], 0
    for tensor in tensors:
        offsets.append(num_bytes)
        size = tensor.numel() * tensor.element_size()
        num_bytes += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, num_bytes


def view(flat: Tensor, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    """A tensor of some dtype and shape at some byte of a buffer."""
    return flat[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
