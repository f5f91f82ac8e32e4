"""The interpreter of pickles builds data, refuses every name that is not on its list, and takes no more
memory than a file has.
"""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import random
import signal
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.blob import Blob, Span
from megatron_rpp.torch_dist.pickles import Record, unpickle
from tests.mcore.damaged import saved_bytes


def read(value: Any, folder: Path) -> Any:
    """What comes back of an object that torch.save wrote, somewhere in a file."""
    file = folder / "file"
    content = saved_bytes(value)
    file.write_bytes(b"x" * 100 + content + b"y" * 100)
    with file.open("rb") as stream:
        return Blob(stream, Span(file, 100, len(content)), "it").value()


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -1, 2**31, 2**100, 1.5, float("inf"), None, True, "\u00e9", (), (1,), (1, 2, 3, 4), [], {}]},
        {1: "x", None: 2, 1.5: 3, False: 4},
        b"",
        bytes(range(256)),
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(24).view(4, 6).t(),
        torch.arange(24, dtype=torch.int16)[3:7],
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor([True, False]),
        torch.arange(4).to(torch.uint16),
        torch.nn.Parameter(torch.ones(2)),
        np.arange(6, dtype=np.uint32).reshape(2, 3),
        random.getstate(),
        [torch.get_rng_state()],
    ],
)
def test_data_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    found = read(value, tmp_path)
    if isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype and found.shape == value.shape and torch.equal(found, value)
    elif isinstance(value, np.ndarray):
        assert found.dtype == value.dtype and np.array_equal(found, value)
    elif isinstance(value, list):
        assert torch.equal(found[0], value[0])
    else:
        assert found == value


def test_what_other_programs_keep_beside_weights_is_let_in_without_its_behavior(tmp_path: Path) -> None:
    """The state of Transformer Engine, and the arguments of Megatron-LM."""
    arguments = argparse.Namespace(path=PosixPath("/x"), dtype=torch.bfloat16, signal=signal.SIGTERM, inner=types.SimpleNamespace(a=1))
    found = read({"args": arguments, "state": [io.BytesIO(b"abc"), torch.zeros(3, dtype=torch.uint8)]}, tmp_path)
    assert isinstance(found["args"], Record) and found["args"].state["dtype"] is torch.bfloat16
    assert found["state"][0].state == b"abc" and torch.equal(found["state"][1], torch.zeros(3, dtype=torch.uint8))


class Call:
    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.what = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what


NAMES: dict[str, tuple[Any, str]] = {
    "a function": (Call(os.mkdir, "made"), "posix.mkdir"),
    "eval": (Call(eval, "open('made', 'w')"), "builtins.eval"),
    "getattr": (Call(getattr, metadata.Metadata, "__init__"), "builtins.getattr"),
    "a function by itself": (builtins.print, "builtins.print"),
    "torch's own loader": (Call(torch.storage._load_from_bytes, b"x"), "torch.storage._load_from_bytes"),
    "a class of torch that acts": (Call(filesystem.FileSystemWriter, "made"), "torch.distributed.checkpoint.filesystem.FileSystemWriter"),
    "another class of torch": (planner.LoadPlan, "torch.distributed.checkpoint.planner.LoadPlan"),
    "a subclass": (Call(torch._utils._rebuild_wrapper_subclass), "torch._utils._rebuild_wrapper_subclass"),
    "a name with a line break": (None, "x.a\\nb"),
}


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_name_that_is_not_on_the_list_is_refused_by_file_and_name(
    what: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value, name = NAMES[what]
    data = pickle.dumps({"x": [value]}, protocol) if value is not None else b"\x80\x04\x8c\x01x\x8c\x03a\nb\x93."
    with pytest.raises(CheckpointError) as caught:
        unpickle(data, where="the file")
    said = str(caught.value).replace("__builtin__", "builtins")
    assert said.startswith("the file: a pickle in it names an object that is not data\n") and f"\n  got: {name}\n" in said
    assert list(tmp_path.iterdir()) == []


def nest(levels: int, pair: Callable[[Any], Any]) -> Any:
    value: Any = pair("x")
    for _ in range(levels):
        value = pair(value)
    return value


SMALL_AND_LARGE: dict[str, bytes] = {
    "an index of four billion": b"\x80\x02]r\xff\xff\xff\xffh\x00.",
    "bytes beyond the end": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "text beyond the end": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x" * 10,
    "a frame beyond the end": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"}",
    "a bytearray of a terabyte": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "an integer of a gigabyte": b"\x80\x02\x8b" + (2**30).to_bytes(4, "little") + b".",
    "an extension": b"\x80\x02\x82\x01.",
    "the state of a list": b"\x80\x02]}b.",
    "an entry of a number": b"\x80\x02K\x01K\x01K\x01s.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call of a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
    "nothing": b"",
    "no end": b"\x80\x02]",
    "an empty stack": b"\x80\x02.",
    "the first protocol": b"I1\n.",
}


@pytest.mark.parametrize("what", SMALL_AND_LARGE)
def test_a_damaged_pickle_is_one_error_and_takes_no_memory(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"^the file: the pickle in it is damaged\n  got: "):
            unpickle(SMALL_AND_LARGE[what], where="the file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def shared_pairs(levels: int) -> bytes:
    """A tuple of the same tuple twice, again and again: a few bytes a level."""
    pairs = (b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x940" for level in range(levels))
    return b"\x8c\x01x\x940" + b"".join(pairs) + b"h" + bytes([levels])


def test_values_that_share_their_parts_beyond_reason_are_refused_at_once(tmp_path: Path) -> None:
    """2**40 values in 300 bytes: as a key they would have to be hashed, as an object compared and printed."""
    pairs = shared_pairs(40)
    with pytest.raises(CheckpointError, match="a key of type tuple"):
        unpickle(b"\x80\x04}" + pairs + b"K\x01s.", where="it")
    with pytest.raises(CheckpointError, match="more values than its bytes can name"):
        unpickle(b"\x80\x04" + pairs + b".", where="it", tensor=lambda piece: piece)
    with pytest.raises(CheckpointError, match="levels"):
        unpickle(pickle.dumps(nest(100, lambda value: [value])), where="it", tensor=lambda piece: piece)


@pytest.mark.parametrize(
    "view",
    [(0, (2**40,), (0,)), (0, (3,), (1,)), (1, (2,), (1,)), (0, (2, 2), (2, 1)), (-1, (1,), (1,)), (0, (1,), (-1,)), (0, (1,), (1, 1))],
)
def test_a_tensor_may_not_be_larger_than_its_storage(view: tuple[Any, ...], tmp_path: Path) -> None:
    """torch.save keeps the storage of two elements; the pickle asks for another view of it."""
    offset, shape, strides = view

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.zeros(2).untyped_storage()
            return torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                                                     offset, shape, strides, False, {})  # fmt: skip

    with pytest.raises(CheckpointError, match="the pickle in it is damaged"):
        read(Tensor(), tmp_path)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ((1, (2**40,), np.dtype("u4"), False, b"1234"), "an array of shape"),
        ((1, (1,), np.dtype("O"), False, [1]), "not a dtype of numbers"),
        ((1, (1,), np.dtype(">u4"), False, b"1234"), "byte order"),
    ],
)
def test_an_array_is_one_of_numbers_and_of_the_size_of_its_bytes(state: Any, words: str, tmp_path: Path) -> None:
    reconstruct = np.zeros(1).__reduce__()[0]
    with pytest.raises(CheckpointError, match=words):
        read(Call(reconstruct, np.ndarray, (0,), b"b", state=state), tmp_path)


def test_a_blob_of_the_first_format_and_a_compressed_one_are_refused(tmp_path: Path) -> None:
    old = saved_bytes([1], is_zip=False)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps("x" * 10**6, 2))
    for content in (old, packed.getvalue(), b""):
        (tmp_path / "file").write_bytes(content)
        with (tmp_path / "file").open("rb") as stream, pytest.raises(CheckpointError, match=r"it is not what torch\.save writes"):
            Blob(stream, Span(tmp_path / "file", 0, len(content)), "it")
