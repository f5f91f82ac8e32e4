"""HF directories that are right, and many that are not."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights.hf_io import INDEX, SINGLE, open_hf, save_hf
from megatron_rpp.weights.rect import Rect
from tests.unit.weights.models import CONFIGS, same, write_source

SHAPES = {"a.weight": (6, 4), "b.weight": (3,), "c.weight": (2, 8)}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", CONFIGS["llama"])


@pytest.fixture
def single(source: Path) -> Path:
    """A directory of one file, written by the safetensors library."""
    save_file(tensors(), source / SINGLE)
    return source


@pytest.fixture
def sharded(source: Path) -> Path:
    """Two shards and an index, written by the safetensors library."""
    values = tensors()
    save_file({"a.weight": values["a.weight"]}, source / "model-00001-of-00002.safetensors")
    save_file({name: values[name] for name in ("b.weight", "c.weight")}, source / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name < 'b' else 2}-of-00002.safetensors" for name in SHAPES}
    (source / INDEX).write_text(json.dumps({"metadata": {"total_size": 172}, "weight_map": weight_map}))
    return source


def save(folder: Path, source: Path, values: dict[str, Tensor], **change: object) -> None:
    save_hf(folder, values.items(), **{"shapes": SHAPES, "dtype": torch.float32, "source": source, **change})


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_rectangle_of_a_library_written_file_is_read_exactly(kind: str, request: pytest.FixtureRequest) -> None:
    with open_hf(request.getfixturevalue(kind)) as checkpoint:
        checkpoint.check(SHAPES)
        assert checkpoint.config["model_type"] == "llama"
        assert same(checkpoint.read(Rect("a.weight", 2, 1, 3, 2)), tensors()["a.weight"][2:5, 1:3])
        assert same(checkpoint.read(Rect("c.weight", 0, 0, 2, 8)), tensors()["c.weight"])
        assert same(checkpoint.read(Rect("b.weight", 1, 0, 2, 1)), tensors()["b.weight"][1:3, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shard_bytes", [40, 10**9])
def test_what_we_write_the_library_reads_back_bitwise(tmp_path: Path, source: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    values = tensors(dtype)
    values["a.weight"] = values["a.weight"].t().contiguous().t()  # strided in memory
    save_hf(tmp_path / "out", values.items(), shapes=SHAPES, dtype=dtype, source=source, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 1000 else 2 if dtype.itemsize == 2 else 3)
    back = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(same(back[name], values[name]) for name in SHAPES)
    with open_hf(tmp_path / "out") as checkpoint:
        checkpoint.check(SHAPES)
        assert checkpoint.config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_an_export_carries_config_and_tokenizer_and_no_weights_of_the_source(tmp_path: Path, sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"old")
    save(tmp_path / "out", sharded, tensors())
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", SINGLE}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (sharded / "tokenizer.json").read_text()


def test_the_stream_may_come_in_any_order_and_in_another_dtype(tmp_path: Path, source: Path) -> None:
    values = {name: tensor.double() for name, tensor in reversed(tensors().items())}
    save(tmp_path / "out", source, values)
    assert all(same(tensor, tensors()[name]) for name, tensor in load_file(tmp_path / "out" / SINGLE).items())


class StopHereError(Exception):
    pass


def test_nothing_stands_under_the_final_name_until_all_is_written(tmp_path: Path, source: Path) -> None:
    seen: list[bool] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for item in tensors().items():
            seen.append((tmp_path / "out").exists())
            yield item
        raise StopHereError

    with pytest.raises(StopHereError):
        save_hf(tmp_path / "out", stream(), shapes=SHAPES, dtype=torch.float32, source=source)
    assert seen == [False] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c.weight": None}, "the stream of tensors ended early\n  expected: c.weight"),
        ({"c.weight": torch.zeros(8, 2)}, r"cannot write c.weight\n  expected: \(2, 8\)\n  got: \(8, 2\)"),
        ({"d.weight": torch.zeros(2)}, "cannot write d.weight\n  expected: no such tensor"),
    ],
)
def test_a_stream_that_is_not_the_model_leaves_nothing_behind(
    tmp_path: Path, source: Path, change: dict[str, Tensor | None], message: str
) -> None:
    values = {name: tensor for name, tensor in {**tensors(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "out", source, values)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_tensor_may_come_only_once(tmp_path: Path, source: Path) -> None:
    twice = [*tensors().items(), ("b.weight", torch.zeros(3))]
    with pytest.raises(CheckpointError, match=r"cannot write b.weight\n  expected: one copy of it"):
        save_hf(tmp_path / "out", twice, shapes=SHAPES, dtype=torch.float32, source=source)


def test_an_existing_directory_is_never_touched(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        save(tmp_path / "out", source, tensors())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot store this dtype"):
        save(tmp_path / "out", source, tensors(), dtype=torch.complex64)


def patch_header(file: Path, change: Callable[[dict], object]) -> None:
    """Rewrites the JSON header of a safetensors file and leaves its data."""
    payload = file.read_bytes()
    (length,) = struct.unpack("<Q", payload[:8])
    header = json.loads(payload[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + payload[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a.weight"].update(dtype="F99"), "a.weight is not of a dtype that weights can have.*got: F99"),
        (lambda h: h["a.weight"].update(dtype="I64"), "a.weight is not of a dtype that weights can have.*got: I64"),
        (lambda h: h["a.weight"].update(dtype="F16"), "a.weight is as long as another shape.*expected: 48 bytes.*got: 96"),
        (lambda h: h["a.weight"].update(shape=[6, 5]), "a.weight is as long as another shape"),
        (lambda h: h["a.weight"].update(shape=[-6, -4]), "a.weight has no proper dtype, shape and offsets"),
        (lambda h: h["a.weight"].update(data_offsets=[0]), "a.weight has no proper dtype, shape and offsets"),
        (lambda h: h["a.weight"].pop("dtype"), "a.weight has no proper dtype, shape and offsets"),
        (lambda h: h.update({"a.weight": 3}), "a.weight has no proper dtype, shape and offsets"),
        (lambda h: h["b.weight"].update(data_offsets=[0, 12]), "b.weight does not start where|a.weight does not start where"),
        (lambda h: h["c.weight"].update(data_offsets=[10_000, 10_064]), "c.weight ends after the file does"),
        (lambda h: h.pop("c.weight"), "bytes that belong to no tensor|does not start where"),
    ],
)
def test_a_header_that_lies_is_refused_with_file_and_tensor(single: Path, change: Callable[[dict], object], message: str) -> None:
    patch_header(single / SINGLE, change)
    with pytest.raises(CheckpointError, match=re.compile(rf"source/model\.safetensors: ({message})", re.DOTALL)):
        open_hf(single)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(single: Path, keep: int) -> None:
    file = single / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"source/model\.safetensors: .*\n(.*\n)*.*truncated or damaged"):
        open_hf(single)


def test_a_file_that_grew_is_refused(single: Path) -> None:
    with (single / SINGLE).open("ab") as stream:
        stream.write(b"junk")
    with pytest.raises(CheckpointError, match="bytes that belong to no tensor"):
        open_hf(single)


@pytest.mark.parametrize("header", [b"not json", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(single: Path, header: bytes) -> None:
    (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"cannot read the header as JSON|the header is not a JSON object"):
        open_hf(single)


def test_a_header_of_absurd_length_is_not_read(single: Path) -> None:
    (single / SINGLE).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="no complete safetensors header"):
        open_hf(single)


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({"a.weight": SECOND}), f"{SECOND}: a.weight is not where the index says"),
        (lambda i: i["weight_map"].pop("b.weight"), "b.weight is in model-00002"),
        (lambda i: i["weight_map"].update({"d.weight": SECOND}), "d.weight is not where the index says"),
        (lambda i: i["weight_map"].update({"d.weight": "model-3.safetensors"}), r"model-3.safetensors: cannot read the file"),
        (lambda i: i["weight_map"].update({"d.weight": "../../etc/x.safetensors"}), "not the name of a shard"),
        (lambda i: i["weight_map"].update({"d.weight": "tokenizer.json"}), "not the name of a shard"),
        (lambda i: i["weight_map"].update({"d.weight": 7}), "no weight_map"),
        (lambda i: i.pop("weight_map"), "no weight_map"),
        (lambda i: i["weight_map"].clear(), "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(sharded: Path, change: Callable[[dict], object], message: str) -> None:
    edit_index(sharded, change)
    with pytest.raises(CheckpointError, match=message):
        open_hf(sharded)


def test_one_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    values = tensors()
    save_file({name: values[name] for name in ("a.weight", "b.weight")}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"b.weight is in model-00001-of-00002"):
        open_hf(sharded)


@pytest.mark.parametrize("file", ["config.json", INDEX, SECOND])
def test_a_missing_file_is_named(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    with pytest.raises(CheckpointError, match="neither" if file == INDEX else re.escape(file)):
        open_hf(sharded)


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_json_file_that_is_no_object_is_named(sharded: Path, file: str, text: str) -> None:
    (sharded / file).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}: (cannot read the file as JSON|the file does not hold)"):
        open_hf(sharded)


def test_two_sets_of_weights_in_one_directory_are_refused(sharded: Path) -> None:
    save_file(tensors(), sharded / SINGLE)
    with pytest.raises(CheckpointError, match=r"one set of weights is needed.*\n.*\n.*both"):
        open_hf(sharded)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "d.weight": (1,)}, r"missing tensors\n  expected: d.weight"),
        ({name: shape for name, shape in SHAPES.items() if name != "b.weight"}, "no place for, in model.safetensors\n  got: b.weight"),
        ({**SHAPES, "a.weight": (4, 6)}, r"model.safetensors: a.weight has another shape\n  expected: \(4, 6\)\n  got: \(6, 4\)"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(single: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with open_hf(single) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.check(shapes)


def test_old_buffers_may_be_ignored_by_their_ending(single: Path) -> None:
    with open_hf(single) as checkpoint:
        checkpoint.check({name: shape for name, shape in SHAPES.items() if name != "b.weight"}, ignored=("b.weight",))


def test_reading_outside_a_tensor_or_no_tensor_is_an_error(single: Path) -> None:
    with open_hf(single) as checkpoint:
        with pytest.raises(CheckpointError, match=r"a.weight is too small"):
            checkpoint.read(Rect("a.weight", 4, 0, 3, 4))
        with pytest.raises(CheckpointError, match=r"no such tensor\n  expected: z.weight"):
            checkpoint.read(Rect("z.weight", 0, 0, 1, 1))


def test_a_file_that_vanished_after_opening_is_named(single: Path) -> None:
    checkpoint = open_hf(single)
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read a\.weight"):
        checkpoint.read(Rect("a.weight", 0, 0, 1, 1))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: what was read or built, not what is merely mapped."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_writing_and_reading_a_model_never_holds_it_in_memory(tmp_path: Path, source: Path) -> None:
    """24 tensors of 8 MB in one file, 192 MB each way. A third of it is allowed: the allocator keeps some of what it freed."""
    shapes = {f"w{i}.weight": (2048, 1024) for i in range(24)}
    peak, before = 0, anonymous_bytes()

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal peak
        for i, (name, shape) in enumerate(shapes.items()):
            tensor = torch.full(shape, float(i))
            peak = max(peak, anonymous_bytes() - before)
            yield name, tensor

    save_hf(tmp_path / "out", stream(), shapes=shapes, dtype=torch.float32, source=source)
    with open_hf(tmp_path / "out") as checkpoint:
        for i, name in enumerate(shapes):
            tensor = checkpoint.read(Rect(name, 0, 0, 2048, 1024))
            assert tensor[2047, 1023] == i
            peak = max(peak, anonymous_bytes() - before)
    assert peak < 64 * 2**20
