"""The calls of device_memory.Driver for a host without a GPU: the "device" is memory files that other processes can open."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout.device_memory import HANDLE_BYTES, Region

UUID = "the-only-gpu"


class SharedDriver:
    """held: address -> (file, mapping) of what is allocated here. opened, closed: how often."""

    uuid = UUID

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, mmap.mmap]] = {}
        self.opened = self.closed = self.synchronised = 0

    def allocate(self, num_bytes: int) -> int:
        file = os.memfd_create("device")
        os.ftruncate(file, num_bytes)
        return self._map(file)

    def _map(self, file: int) -> int:
        mapping = mmap.mmap(file, 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.held[address] = file, mapping
        return address

    def free(self, address: int) -> None:
        file, _ = self.held.pop(address)
        os.close(file)

    def export(self, address: int) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self.held[address][0]}".encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> int:
        self.opened += 1
        return self._map(os.open(handle.rstrip(b"\0").decode(), os.O_RDWR))

    def close(self, address: int) -> None:
        self.closed += 1
        self.free(address)

    def bytes_at(self, region: Region) -> Tensor:
        buffer = (ctypes.c_ubyte * region.num_bytes).from_address(region.address)
        buffer.region = region
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def synchronise(self) -> None:
        self.synchronised += 1


class Unshared(SharedDriver):
    """A driver that lets no other process in, as in some containers."""

    def export(self, address: int) -> bytes:
        raise EngineError("cuIpcGetMemHandle failed: operation not supported (801)", where="GPU 0")
