"""Tensors handed to another process of this host without leaving their GPU: memory.py for a device that has memory of its own.

The writer keeps regions of plain device memory; what arrives from other ranks is received right there. A description names the
regions and where in them each tensor lies. The reader opens a region once, on the GPU of the same UUID whatever its number
there, and closes it when the writer names it no more. What is named must not be written before the reader has answered.
Regions come from the driver itself: neither torch's allocator with expandable segments nor torch_memory_saver makes memory
that can be opened by another process.
"""

from __future__ import annotations

import ctypes
import itertools
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout import memory
from megatron_rpp.rollout.memory import Bucket, Outbox

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
# Smaller allocations may share a block of the driver's, which another process then opens as a whole, and cannot open twice.
GRAIN_BYTES = 2 * 2**20
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is


class Driver(Protocol):
    """What the driver can do on one device. Addresses are the device's; `uuid` is the same in every process."""

    uuid: str

    def allocate(self, num_bytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def export(self, address: int) -> bytes:
        """HANDLE_BYTES with which another process can open an allocation."""
        ...

    def open(self, handle: bytes) -> int: ...

    def close(self, address: int) -> None: ...

    def bytes_at(self, region: Region) -> Tensor:
        """A region as uint8 [num_bytes]; the tensor and all views of it keep the region."""
        ...

    def synchronise(self) -> None:
        """Returns when all that was queued on the current stream is done."""
        ...


class Region:
    """Device memory that is given back when the last tensor in it is gone, not when a process ends: the driver does that."""

    def __init__(self, address: int, num_bytes: int, release: Callable[[int], None]) -> None:
        self.address, self.num_bytes = address, num_bytes
        weakref.finalize(self, release, address).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """How torch.as_tensor sees it, without a copy."""
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where a tensor begins in it; None for one that lies elsewhere, or not in one piece."""
        at, size = tensor.data_ptr() - self.address, tensor.numel() * tensor.element_size()
        return at if tensor.is_contiguous() and 0 <= at <= self.num_bytes - size else None


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaDriver:
    """The CUDA driver by ctypes. Raises: EngineError naming the call that failed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library = ctypes.CDLL("libcuda.so.1")
        self.uuid = str(torch.cuda.get_device_properties(device).uuid)

    def _call(self, name: str, *args: Any) -> None:
        with torch.cuda.device(self._device):
            # Any call of the runtime makes its context this thread's, and the driver's calls need one.
            torch.cuda.mem_get_info(self._device)
            code = getattr(self._library, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise EngineError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code})", where=f"GPU {self.uuid}")

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
        return address.value

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def bytes_at(self, region: Region) -> Tensor:
        return torch.as_tensor(region, device=self._device)

    def synchronise(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


class DeviceOutbox:
    """The writer's end. One bucket at a time, as with memory.Outbox; only what lies outside its regions is copied."""

    def __init__(self, driver: Driver) -> None:
        """Raises: EngineError where the driver does not let memory be opened by others."""
        self._driver, self._writer, self._ids = driver, uuid.uuid4().hex, itertools.count()
        self._regions: weakref.WeakValueDictionary[str, Region] = weakref.WeakValueDictionary()
        self._handles: dict[str, str] = {}
        self._spill, self._outgrown = self.empty(GRAIN_BYTES), []  # what `pack` copies into

    def empty(self, num_bytes: int, device: torch.device | None = None) -> Tensor:
        """Memory of this outbox, uint8 [num_bytes], whose contents are described where they lie. Given back with its last view.

        Let go of it only when no living reader has seen it: what the driver does with memory that is still open is undefined.
        device: ignored; regions are on the outbox's own.
        """
        driver, name, size = self._driver, str(next(self._ids)), _in_grains(num_bytes)
        region = Region(driver.allocate(size), size, driver.free)
        self._handles[name] = driver.export(region.address).hex()
        self._regions[name] = region
        return driver.bytes_at(region)[:num_bytes]

    def pack(self, bucket: Bucket) -> dict[str, Any]:
        """Describe the tensors for `unpack` in any process of this user on this host that has the GPU. All writes are done then.

        Shapes: any, on the outbox's device or not.
        """
        self._outgrown.clear()  # the reader has answered to a bucket that did not name it, and so has closed it
        places = [self._place(tensor) for _, tensor in bucket]
        outside = [number for number, place in enumerate(places) if place is None]
        for number, place in zip(outside, self._copy([bucket[number][1] for number in outside]), strict=True):
            places[number] = place
        entries = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), place]
            for (name, tensor), place in zip(bucket, places, strict=True)
        ]
        self._driver.synchronise()
        regions = {name: [self._handles[name], region.num_bytes] for name, region in self._regions.items()}
        self._handles = {name: self._handles[name] for name in regions}
        return {"writer": self._writer, "uuid": self._driver.uuid, "regions": regions, "tensors": entries}

    def _place(self, tensor: Tensor) -> tuple[str, int] | None:
        found = ((name, region.offset_of(tensor)) for name, region in self._regions.items())
        return next(((name, at) for name, at in found if at is not None), None)

    def _copy(self, tensors: list[Tensor]) -> list[tuple[str, int] | None]:
        """Bring tensors from elsewhere into a region that grows when it must."""
        offsets, num_bytes = memory.offsets_of(tensors)
        if num_bytes > self._spill.numel():
            self._outgrown.append(self._spill)
            del self._regions[self._place(self._spill)[0]]
            self._spill = self.empty(_in_grains(num_bytes))
        for tensor, offset in zip(tensors, offsets, strict=True):
            memory.view(self._spill, tensor.dtype, list(tensor.shape), offset).copy_(tensor.detach())
        name, start = self._place(self._spill)
        return [(name, start + offset) for offset in offsets]

    def close(self) -> None:
        """Give back its own region; those that `empty` made go with their last views."""
        self._outgrown.clear()
        self._spill = torch.empty(0, dtype=torch.uint8)


def _in_grains(num_bytes: int) -> int:
    return max(1, -(-num_bytes // GRAIN_BYTES)) * GRAIN_BYTES


class Inbox:
    """The reader's end in one process: every region is opened once, and lasts as long as its writer names it.

    find: the driver of the GPU with some UUID. Raises: EngineError.
    """

    def __init__(self, find: Callable[[str], Driver]) -> None:
        self._find = find
        self._open: dict[str, dict[str, Tensor]] = {}  # by writer, then by region

    def unpack(self, bucket: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
        """The named tensors of a description, as views of the writer's memory: not to be written to."""
        writer, regions = bucket["writer"], bucket["regions"]
        known = {name: flat for name, flat in self._open.get(writer, {}).items() if name in regions}
        self._open[writer] = known
        driver = self._find(bucket["uuid"]) if regions.keys() - known.keys() else None
        for name in regions.keys() - known.keys():
            handle, num_bytes = regions[name]
            known[name] = driver.bytes_at(Region(driver.open(bytes.fromhex(handle)), num_bytes, driver.close))
        for name, dtype, shape, (region, offset) in bucket["tensors"]:
            yield name, memory.view(known[region], getattr(torch, dtype), shape, offset)

    def close(self) -> None:
        """Close every region in which no tensor lies any more; a process that ends need not."""
        self._open.clear()


def cuda_driver_of(wanted: str) -> CudaDriver:
    """The driver of the visible GPU with a UUID. Raises: EngineError when this process does not see it."""
    seen = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    if wanted not in seen:
        raise EngineError(
            "the weights lie on a GPU that this process does not see",
            where="weights",
            expected=f"GPU {wanted} in CUDA_VISIBLE_DEVICES",
            got=seen,
            fix="start each engine on the GPUs of its own trainer ranks",
        )
    return CudaDriver(torch.device("cuda", seen.index(wanted)))


_inbox = Inbox(cuda_driver_of)


def unpack(bucket: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of a description of either kind of outbox. Raises: EngineError for memory that this process cannot open."""
    return memory.unpack(bucket) if "path" in bucket else _inbox.unpack(bucket)


def open_outbox(
    device: torch.device, *, warn: Callable[[str], None], driver_of: Callable[[torch.device], Driver] = CudaDriver
) -> Outbox | DeviceOutbox:
    """The outbox for tensors of a device: through its own memory on a GPU, through the host's elsewhere.

    Where the driver refuses to share memory (some containers and virtual GPUs), the host's it is, after one warning.
    """
    if device.type == "cpu":
        return Outbox()
    try:
        return DeviceOutbox(driver_of(device))
    except (EngineError, OSError) as error:
        warn(f"weights go to the engine through host memory, which is slower: {error}")
        return Outbox()
