"""Everything that a pickle in a checkpoint may name, and what it gets for each name.

Nothing here is the object that the name stands for. Tensors are described, numpy arrays take numbers only,
and an instance of any other class becomes a `Record`, which has a name and a state and no behavior.
Source: torch/_utils.py, torch/distributed/checkpoint, megatron/core/safe_globals.py and numpy's __reduce__
methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

_AXES = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor as its pickle describes it. record: of the zip that holds its storage of `numel` elements."""

    record: str
    dtype: torch.dtype
    numel: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the storage is the tensor in C order. An axis of one element may have any stride."""
        wanted = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        are_long = all(n == 1 or stride == want for n, stride, want in zip(self.shape, self.strides, wanted, strict=True))
        return self.offset == 0 and self.numel == math.prod(self.shape) and are_long


class Record:
    """An instance of a class that is on the list: its name and its state. It has no behavior."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind, self.state = kind, None

    def field(self, name: str, kind: type) -> Any:
        """A field of the state. Raises: ValueError when it is missing or of another type."""
        value = self.state.get(name) if isinstance(self.state, dict) else None
        if type(value) is not kind:
            raise ValueError(f"{self.kind}.{name} is not of type {kind.__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Name:
    """What stands for an importable object. call: what a pickle gets that calls it, or makes an instance."""

    name: str
    call: Callable[..., Any]


class Array(np.ndarray):
    """An array of numbers, filled by the state that numpy pickles."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, is_fortran, data = state
        if version != 1 or type(dtype) is not Dtype or type(data) is not bytes:
            raise ValueError("not the state of an array of numbers")
        if math.prod(sizes(shape)) * dtype.numpy.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
        super().__setstate__((1, shape, dtype.numpy, bool(is_fortran), data))


class Dtype:
    """A numpy dtype of plain numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or len(code) != 2 or code[0] not in "iufb" or code[1] not in "1248":
            raise ValueError("not a dtype of numbers")
        self.numpy = np.dtype(code)

    def check(self, state: tuple[Any, ...]) -> None:
        """The state of a dtype, of which only the byte order says anything about plain numbers."""
        if state[1] not in ("<", "|", "="):
            raise ValueError("numbers in another byte order")


def sizes(values: Any) -> tuple[int, ...]:
    """A tuple of axes. Raises: ValueError for anything else."""
    if not isinstance(values, tuple | list) or len(values) > _AXES or any(type(n) is not int or n < 0 for n in values):
        raise ValueError("not the sizes of a tensor")
    return tuple(values)


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("not bytes")
    return text.encode("latin1")


def as_bytes(value: Any = b"") -> bytes:
    """Bytes as they are. Raises: ValueError for anything else."""
    if type(value) is not bytes:
        raise ValueError("not bytes")
    return value


def _record(kind: str, *_: Any) -> Record:
    return Record(kind)


def _list_of_keys(values: Any = ()) -> list[Any]:
    return [as_key(value) for value in values]


def as_key(value: Any) -> Any:
    """A key of a dict. A tuple is none: hashing a nest of tuples that share their parts takes forever."""
    if isinstance(value, Record) and value.kind == "MetadataIndex":
        offset = value.state.get("offset") if isinstance(value.state, dict) else None
        return value.field("fqn", str), None if offset is None else sizes(offset)
    if value is not None and type(value) not in (str, int, float, bool):
        raise ValueError(f"a key of type {type(value).__name__}")
    return value


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Piece:
    record, dtype, numel = storage
    return _piece(record, dtype, numel, (offset, shape, strides))


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Piece:
    record, _, num_bytes = storage
    _requires_grad, _hooks, dtype, *_ = rest
    if not isinstance(dtype, torch.dtype):
        raise ValueError("not a dtype")
    return _piece(record, dtype, num_bytes // dtype.itemsize, (offset, shape, strides))


def _piece(record: str, dtype: Any, numel: int, view: tuple[Any, Any, Any]) -> Piece:
    offset, shape, strides = view
    (offset,), shape, strides = sizes([offset]), sizes(shape), sizes(strides)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # A view may not be larger than its storage: one with strides of 0 would ask for any amount of memory
    # when it is copied.
    if type(record) is not str or type(numel) is not int or not isinstance(dtype, torch.dtype):
        raise ValueError("not a storage")
    if math.prod(shape) > numel or (math.prod(shape) and offset + last >= numel):
        raise ValueError(f"a tensor of shape {shape} in a storage of {numel} elements")
    return Piece(record, dtype, numel, offset, shape, strides)


def _names() -> dict[str, Any]:
    """The list: everything that a pickle in a checkpoint may name. Values stand for themselves."""
    data: dict[str, Callable[..., Any]] = {
        "torch.Size": sizes,
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": lambda piece, *_: piece,
        "torch.nn.parameter.Parameter": lambda piece, *_: piece,
        "collections.OrderedDict": lambda: {},
        "_codecs.encode": _latin1,
        "_io.BytesIO": partial(_record, "BytesIO"),
        "numpy.dtype": Dtype,
        "numpy.ndarray": lambda *_: np.ndarray.__new__(Array, (0,), "b"),
    }
    for module in ("builtins", "__builtin__"):
        data |= {f"{module}.bytes": as_bytes, f"{module}.bytearray": as_bytes, f"{module}.set": _list_of_keys}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        data[f"{module}._reconstruct"] = lambda *_: np.ndarray.__new__(Array, (0,), "b")
    names: dict[str, Any] = {name: Name(name, call) for name, call in data.items()}
    names |= {name: Name(name, partial(_record, name.rpartition(".")[2])) for name in _RECORDS}
    names |= {f"torch.{name}": Storage(dtype) for name, dtype in _STORAGES.items()}
    names["torch.storage.UntypedStorage"] = Storage(torch.uint8)
    return names | {str(dtype): dtype for dtype in _DTYPES}


@dataclass(frozen=True, slots=True)
class Storage:
    """The type of a storage: what its elements are."""

    dtype: torch.dtype


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# uint16 and wider, and float8, have no storage type of their own.
_DTYPES = (*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
_METADATA = "torch.distributed.checkpoint.metadata."
_PLANNER = "torch.distributed.checkpoint.planner."
# Classes whose instances become records: what the list of tensors is made of, then what Megatron keeps
# beside it. Of the second kind nothing is used. Megatron-LM lets the same classes into its common.pt
# (megatron/core/safe_globals.py).
_RECORDS = (
    *(f"{_METADATA}{name}" for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_METADATA}{name}" for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")),
    *(f"{_PLANNER}{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.serialization._get_layout",
    "torch.device",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "signal.Signals",
    "numpy.dtypes.UInt32DType",
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
)
NAMES = _names()
