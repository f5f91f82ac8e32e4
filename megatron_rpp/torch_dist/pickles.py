"""The pickles in a checkpoint, read by an interpreter that can build data and nothing else.

A pickle is a program: it names importable objects and calls them. This interpreter imports nothing that a
pickle names. It looks each name up in the table of names.py and uses the constructor written there, or
refuses the file. Opcodes that torch and Megatron do not write are refused too. It is Python's own
pure-Python interpreter underneath, because the C version allocates what a length or an index in the file
asks for before it looks whether the file is that long.

torch's `weights_only=True` is not enough here: it calls the functions on its list with any arguments,
Megatron adds classes to that list, and neither the list of tensors nor the objects of a checkpoint are read
with it.
Source: pickle.py and pickletools.py of CPython; torch/serialization.py; torch/distributed/checkpoint.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch

from megatron_rpp.display import printable
from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.names import NAMES, Array, Dtype, Name, Piece, Record, Storage, as_bytes, as_key, sizes

# What reading a damaged pickle can raise.
BROKEN = (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, struct.error)
BROKEN += (RecursionError, MemoryError, AssertionError)
FETCH = "the checkpoint is damaged: fetch it again, or take an older one"
_REFUSED = "a pickle in it names an object that is not data"
_EXPECTED = "numbers, text, tensors and the classes that torch and Megatron keep them in"
_FIX = "do not use this checkpoint: a program that loads it without this check may run the code that it names"
_DEPTH = 64


class NotDataError(Exception):
    """The name of an object in a pickle that is not on the list."""


_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.MEMOIZE, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GLOBAL, pickle.STACK_GLOBAL),
)


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What each opcode does."""

    def __missing__(self, opcode: int) -> NoReturn:
        raise pickle.UnpicklingError(f"an opcode {bytes([opcode])!r}, which no checkpoint has")


class _Interpreter(pickle._Unpickler):
    """Python's, with fewer opcodes, and with its own way to name, call, create and fill."""

    dispatch: ClassVar[_Opcodes] = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES})

    def __init__(self, data: bytes, tensor: Callable[[Piece], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self.tensor = tensor

    def find_class(self, module: str, name: str) -> Any:
        found = NAMES.get(f"{module}.{name}")
        if found is None:
            raise NotDataError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        kind, storage, record, _, numel = pid
        if self.tensor is None or kind != "storage" or type(storage) is not Storage or type(record) is not str:
            raise ValueError("not a storage")
        return record, storage.dtype, sizes([numel])[0]

    def load_reduce(self) -> None:
        """A call, and the creation of an instance: both replace name and arguments by what the list says."""
        arguments = self.stack.pop()
        name = self.stack[-1]
        if type(name) is not Name or type(arguments) is not tuple:
            raise ValueError(f"a call of an object of type {type(name).__name__}")
        made = name.call(*arguments)
        self.stack[-1] = self.tensor(made) if isinstance(made, Piece) and self.tensor is not None else made

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Record:
            target.state = as_bytes(state[0]) if target.kind == "BytesIO" else state
        elif type(target) is Array:
            target.__setstate__(state)
        elif type(target) is Dtype:
            target.check(state)
        elif type(target) is not dict:  # an OrderedDict may have attributes, which nobody reads
            raise ValueError(f"a state for an object of type {type(target).__name__}")

    def load_append(self) -> None:
        value = self.stack.pop()
        _list(self.stack[-1]).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        _list(self.stack[-1]).extend(values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        _list(self.stack[-1]).extend(as_key(value) for value in values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _dict(self.stack[-1])[as_key(key)] = value

    def load_setitems(self) -> None:
        values = self.pop_mark()
        target = _dict(self.stack[-1])
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[as_key(key)] = value

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build}
    dispatch |= {pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends, pickle.ADDITEMS[0]: load_additems}
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    dispatch |= {pickle.EMPTY_SET[0]: dispatch[pickle.EMPTY_LIST[0]]}


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"an item for an object of type {type(value).__name__}")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"an entry for an object of type {type(value).__name__}")
    return value


def unpickle(data: bytes, *, where: str, tensor: Callable[[Piece], Any] | None = None) -> Any:
    """What a pickle stands for, built of plain values, tensors, arrays of numbers and `Record`s. A set
    becomes a list.

    tensor: makes a tensor of its description; None: there are no tensors in this pickle. where: names it in
    an error.
    Raises: CheckpointError for a name that is not on the list, and for a damaged pickle; what `tensor`
    raises.
    """
    try:
        found = _Interpreter(data, tensor).load()
        if tensor is not None:
            _check_size(found, 1000 + 16 * len(data))
    except NotDataError as error:
        raise CheckpointError(_REFUSED, where=where, expected=_EXPECTED, got=shortened(str(error)), fix=_FIX) from None
    except BROKEN as error:
        got = shortened(f"{type(error).__name__}: {error}")
        raise CheckpointError("the pickle in it is damaged", where=where, got=got, fix=FETCH) from error
    return found


def _check_size(value: Any, limit: int) -> None:
    """Raises ValueError for a deep nest, and for one whose parts share theirs, so that a few bytes stand
    for billions of values.
    """
    level, num_values = [value], 0
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list | tuple):
                inner += one
            elif isinstance(one, Record) and one.kind != "BytesIO":
                inner.append(one.state)
            if num_values + len(inner) > limit:
                raise ValueError("more values than its bytes can name")
        num_values += len(inner)
        if not inner:
            return
        level = inner
    raise ValueError(f"values in more than {_DEPTH} levels")


def is_plain(value: Any) -> bool:
    """Whether it is made of numbers, text, lists and dicts alone."""
    if isinstance(value, dict | list | tuple):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float)


def shortened(text: str, limit: int = 200) -> str:
    """Text of a file as one line of bounded length."""
    text = printable(text)
    return text if len(text) <= limit else f"{text[:limit]} ..."
