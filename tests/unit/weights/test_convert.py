"""HF directory to Megatron checkpoint and back: every family to the bit, cut off and gone on with, and refused when it is not right."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp

from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights.compare import compare
from megatron_rpp.weights.convert import Options, to_hf, to_megatron
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.hf_io import open_hf, save_hf
from megatron_rpp.weights.megatron_checkpoint import open_megatron
from megatron_rpp.weights.rect import Rect
from tests.unit.weights.models import ALL_CONFIGS, random_hf, same, write_source
from tests.unit.weights.oracle import megatron_ranks

SMALL = Options(shard_bytes=20_000, block_bytes=1000)
HEADER = {"format": "of a test"}


def make_hf(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 30_000) -> Path:
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_source(folder.parent / f"{folder.name} config", config)
    model = describe(config)
    tensors = random_hf(model, dtype).items()
    save_hf(folder, tensors, shapes=model.hf_shapes, dtype=dtype, source=folder.parent / f"{folder.name} config",
            own_dtypes=model.hf_dtypes, shard_bytes=shard_bytes)  # fmt: skip
    return folder


def convert(hf: Path, out: Path, options: Options = SMALL):
    with open_hf(hf) as source:
        return to_megatron(source, describe(source.config), out, header=HEADER, options=options)


def convert_back(checkpoint: Path, out: Path, options: Options = SMALL):
    config = json.loads((checkpoint / "hf" / "config.json").read_text())
    with open_megatron(checkpoint, describe(config)) as source:
        return to_hf(source, out, carried=checkpoint / "hf", options=options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "in", ALL_CONFIGS["llama"])


@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_there_and_back_again_is_the_same_to_the_bit(tmp_path: Path, family: str) -> None:
    hf = make_hf(tmp_path / "in", ALL_CONFIGS[family])
    there = convert(hf, tmp_path / "there")
    back = convert_back(tmp_path / "there", tmp_path / "back")
    before, after = tensors_of(hf), tensors_of(tmp_path / "back")
    assert there.tensors == back.tensors == len(before) and before.keys() == after.keys()
    assert there.files > 2 and back.files > 2 and there.resumed_files == back.resumed_files == 0
    assert there.num_bytes == sum(tensor.nbytes for tensor in before.values())
    assert all(same(after[name], tensor) for name, tensor in before.items())
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "in", "in config", "there"]


def key_of(name: str, config: dict[str, Any], by_layer: bool) -> tuple[str, tuple[int, ...]]:
    """A Megatron name as key and leading index, from the description of the format and not from the code."""
    words, index = name.split("."), []
    if words[0] == "decoder" and words[1] == "layers" and not by_layer:
        index.append(int(words.pop(2)))
    if "experts" in words:
        at = words.index("experts")
        index.append(int(words[-1].removeprefix("weight")))
        words[at:] = ["experts", "experts", words[-2], "weight"]
    return ".".join(words), tuple(index)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_torch_reads_what_megatron_would_hold_at_tp_1(tmp_path: Path, family: str) -> None:
    """torch's own reader, with shapes from its own list, against the slow oracle."""
    config = ALL_CONFIGS[family]
    hf = make_hf(tmp_path / "in", config, torch.float32)
    convert(hf, tmp_path / "out")
    reader = dcp.FileSystemReader(tmp_path / "out")
    listed = {key: entry for key, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
    found = {key: torch.full(entry.size, float("nan")) for key, entry in listed.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    layers = [list(range(config["num_hidden_layers"]))]
    config = {**config, "num_key_value_heads": config["num_key_value_heads"] or config["num_attention_heads"]}
    (expected,) = megatron_ranks(config, tensors_of(hf), layers, tp=1, replicas=1, ep=1, etp=1)
    used = set()
    for name, tensor in expected.items():
        key, index = key_of(name, config, by_layer=any(".mlp.experts." in other for other in expected))
        if "vocab" in name or name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensor = tensor[: config["vocab_size"]]
        assert torch.equal(found[key][index], tensor), name
        used.add(key)
    assert used == found.keys()


def test_a_dtype_that_is_asked_for_is_given_to_every_tensor_but_the_routers_biases(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "in", ALL_CONFIGS["deepseek_v3, router bias"], torch.float32)
    convert(hf, tmp_path / "there", replace(SMALL, dtype=torch.bfloat16))
    convert_back(tmp_path / "there", tmp_path / "back")
    for name, tensor in tensors_of(tmp_path / "back").items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert same(tensor, tensors_of(hf)[name].to(dtype)), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


class StopHereError(Exception):
    pass


def stopping_after(writes: int) -> Callable[[str, int], None]:
    def tick(what: str, num_bytes: int) -> None:
        nonlocal writes
        writes -= what == "write"
        if writes < 0:
            raise StopHereError

    return tick


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_run_that_was_cut_off_is_gone_on_with(tmp_path: Path, hf: Path, direction: str) -> None:
    convert(hf, tmp_path / "whole")
    start = (
        (lambda o: convert(hf, tmp_path / "out", o))
        if direction == "there"
        else lambda o: convert_back(tmp_path / "whole", tmp_path / "out", o)
    )
    with pytest.raises(StopHereError):
        start(replace(SMALL, tick=stopping_after(80)))
    unfinished = tmp_path / ".out.unfinished"
    assert not (tmp_path / "out").exists()
    done = [file for file in unfinished.iterdir() if file.suffix in (".distcp", ".safetensors")]
    assert len(done) >= 2 and list(unfinished.glob("*.part"))
    stamps = {file: file.stat().st_mtime_ns for file in done}
    os.utime(done[0], ns=(1, 1))  # times do not count, contents do
    damaged = bytearray(done[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    done[1].write_bytes(damaged)
    result = start(SMALL)
    assert result.resumed_files == len(done) - 1
    assert not unfinished.exists() and not list((tmp_path / "out").glob("*.part")) and not (tmp_path / "out" / "journal.json").exists()
    kept = [file for file in done[2:] if (tmp_path / "out" / file.name).stat().st_mtime_ns == stamps[file]]
    assert len(kept) == len(done) - 2
    if direction == "there":
        assert (tmp_path / "out" / "files.json").read_bytes() == (tmp_path / "whole" / "files.json").read_bytes()
    else:
        assert all(same(tensor, tensors_of(hf)[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_another_source_or_another_dtype_starts_again(tmp_path: Path, hf: Path) -> None:
    with pytest.raises(StopHereError):
        convert(hf, tmp_path / "out", replace(SMALL, tick=stopping_after(80)))
    with pytest.raises(StopHereError):
        convert(hf, tmp_path / "out", replace(SMALL, dtype=torch.float32, tick=stopping_after(80)))
    file = min(hf.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
    assert convert(hf, tmp_path / "out").resumed_files == 0
    with open_hf(hf) as source, open_megatron(tmp_path / "out", describe(source.config)) as written:
        assert compare(source, written) is None


def test_only_overwrite_replaces_and_only_when_the_new_one_is_complete(tmp_path: Path, hf: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match=r"out: already exists\n.*--overwrite"):
        convert(hf, tmp_path / "out")
    seen = []
    convert(hf, tmp_path / "out", replace(SMALL, overwrite=True, tick=lambda *_: seen.append((tmp_path / "out" / "mine").exists())))
    assert all(seen) and not (tmp_path / "out" / "mine").exists() and (tmp_path / "out" / "files.json").exists()
    for target in (hf, tmp_path):
        with pytest.raises(CheckpointError, match="the source lies in it"):
            convert(hf, target, replace(SMALL, overwrite=True))


def test_two_runs_do_not_write_one_directory(tmp_path: Path, hf: Path) -> None:
    def other_run(what: str, num_bytes: int) -> None:
        with pytest.raises(CheckpointError, match="another process is writing it"):
            convert(hf, tmp_path / "out")
        raise StopHereError

    with pytest.raises(StopHereError):
        convert(hf, tmp_path / "out", replace(SMALL, tick=other_run))


def test_a_bit_that_the_disk_turns_after_writing_is_found(tmp_path: Path, hf: Path) -> None:
    def flip(what: str, num_bytes: int) -> None:
        file = tmp_path / ".out.unfinished" / "__0_0.distcp"
        if what == "compare" and not flipped:
            payload = bytearray(file.read_bytes())
            payload[payload.index(needle) + 3] ^= 64
            file.write_bytes(payload)
            flipped.append(True)

    flipped: list[bool] = []
    needle = tensors_of(hf)["model.layers.0.self_attn.o_proj.weight"].view(torch.int16).numpy().tobytes()[:200]
    with pytest.raises(CheckpointError, match=r"out: model\.layers\.0\.self_attn\.o_proj\.weight: element \[0, 1\] is not what was read"):
        convert(hf, tmp_path / "out", replace(SMALL, tick=flip))
    assert flipped and not (tmp_path / "out").exists()


def edit_config(folder: Path, **change: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(config))


def edit_shard(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = next(file for file in folder.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


LAST = "model-00004-of-00004"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / f"{LAST}.safetensors", 2000), f"{LAST}.safetensors: .* ends after the file does"),
    "other dtype": (
        lambda f: edit_shard(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()})),
        f"{LAST}.safetensors: lm_head.weight is of another dtype than the model\n  expected: torch.bfloat16\n  got: torch.float16",
    ),
    "missing shard": (lambda f: (f / f"{LAST}.safetensors").unlink(), f"{LAST}.safetensors: cannot read the file"),
    "extra tensor": (
        lambda f: (
            edit_shard(f, lambda t: t.update({"new.weight": t["lm_head.weight"].clone()})),
            edit_index(f, lambda m: m.update({"new.weight": f"{LAST}.safetensors"})),
        ),
        f"tensors that the model has no place for, in {LAST}.safetensors\n  got: new.weight",
    ),
    "missing tensor": (
        lambda f: (edit_shard(f, lambda t: t.pop("lm_head.weight")), edit_index(f, lambda m: m.pop("lm_head.weight"))),
        "missing tensors\n  expected: lm_head.weight",
    ),
    "index lies": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "model-00001-of-00004.safetensors"})),
        "lm_head.weight is in model-00004|lm_head.weight is not where the index says",
    ),
    "config: vocabulary": (lambda f: edit_config(f, vocab_size=300), "model.embed_tokens.weight has another shape"),
    "config: layers": (lambda f: edit_config(f, num_hidden_layers=9), r"missing tensors\n  expected: model.layers.8"),
    "config: dtype": (lambda f: edit_config(f, torch_dtype="float32"), "is of another dtype than the model\n  expected: torch.float32"),
    "config: no dtype": (lambda f: edit_config(f, torch_dtype="int7"), "config.json: not a dtype of weights"),
}


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage", HOSTILE)
def test_an_hf_directory_that_is_not_right_is_refused_by_file_and_tensor(tmp_path: Path, hf: Path, damage: str) -> None:
    change, message = HOSTILE[damage]
    change(hf)
    with pytest.raises(CheckpointError, match=message):
        convert(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()


def rewrite_list(folder: Path, change: Callable[[Any], object]) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil-was-here",)


def turn(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


NORM = "decoder.final_layernorm.weight"
NOT_DATA = r"\.metadata: a pickle in it names an object that is not data\n.*\n  got: posix.mkdir"
HOSTILE_MEGATRON: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / "__0_0.distcp", 20_000), "__0_0.distcp: .* ends after the file does"),
    "missing file": (lambda f: (f / "__0_1.distcp").unlink(), r"__0_1\.distcp: cannot read decoder"),
    "no list": (lambda f: (f / ".metadata").unlink(), r"\.metadata: there is no such file"),
    "not a list": (lambda f: (f / ".metadata").write_bytes(b"\x80\x04nonsense"), r"\.metadata: the pickle in it is damaged"),
    "a list that acts": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Evil())),
        NOT_DATA,
    ),
    "blob of another dtype": (
        lambda f: turn(f / "__0_0.distcp", b"BFloat16Storage", b"BFloat32Storage"),
        "__0_0.distcp: .* is not what torch.save writes",
    ),
    "blob of another shape": (
        lambda f: rewrite_list(f, lambda m: setattr(m.state_dict_metadata[NORM].properties, "dtype", torch.float16)),
        f"{NORM} .* is another tensor",
    ),
    "key missing": (lambda f: rewrite_list(f, lambda m: m.state_dict_metadata.pop(NORM)), f"missing tensors\n  expected: {NORM}"),
    "key unknown": (
        lambda f: rewrite_list(f, lambda m: m.state_dict_metadata.update({"x.weight": m.state_dict_metadata.pop(NORM)})),
        "x.weight .* has no file",
    ),
    "chunk missing": (
        lambda f: rewrite_list(f, lambda m: m.state_dict_metadata["output_layer.weight"].chunks.pop()),
        "output_layer.weight is not whole",
    ),
    "chunk outside": (
        lambda f: rewrite_list(f, lambda m: setattr(m.state_dict_metadata["output_layer.weight"], "size", torch.Size([301, 23]))),
        "output_layer.weight has a part outside its shape",
    ),
    "config of another model": (lambda f: edit_config(f / "hf", intermediate_size=40), "linear_fc1.weight has another shape"),
}


@pytest.mark.parametrize("damage", HOSTILE_MEGATRON)
def test_a_megatron_checkpoint_that_is_not_right_is_refused_by_file_and_tensor(
    tmp_path: Path, hf: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(hf, tmp_path / "there")
    change, message = HOSTILE_MEGATRON[damage]
    change(tmp_path / "there")
    (tmp_path / "there" / "files.json").unlink()  # as in a checkpoint of another program
    with pytest.raises(CheckpointError, match=message):
        convert_back(tmp_path / "there", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil-was-here").exists()


def test_the_first_difference_is_named_with_both_values(tmp_path: Path, hf: Path) -> None:
    shutil.copytree(hf, tmp_path / "other")
    edit_shard(tmp_path / "other", lambda t: t["lm_head.weight"][7, 5].add_(1))
    with open_hf(hf) as left, open_hf(tmp_path / "other") as right:
        found = compare(left, right)
        value = left.read(Rect("lm_head.weight", 7, 5, 1, 1)).item()
        assert (found.tensor, found.what, found.left) == ("lm_head.weight", "element [7, 5]", value)
        assert compare(left, left) is None


MEMORY = """
    import sys
    from pathlib import Path
    from tests.unit.weights.test_convert import convert, convert_back, Options
    def peak():  # ru_maxrss begins with that of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    before, root, options = peak(), Path(sys.argv[1]), Options(block_bytes=int(sys.argv[2]))
    convert(root / "in", root / "there", options)
    print(peak() - before)
    convert_back(root / "there", root / "back", options)
    print(peak() - before)
"""


def test_memory_is_that_of_a_few_blocks_whatever_the_size_of_the_model_and_of_its_largest_tensor(tmp_path: Path) -> None:
    """190 MB in 2 files each way, blocks of 2 MB, two tensors of 82 MB. 24 MB are for pages of code that are first touched then, and
    for the allocator."""
    block_bytes = 2**21
    config = {**ALL_CONFIGS["llama"], "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": 80_000}
    hf = make_hf(tmp_path / "in", config, shard_bytes=100 * 10**6)
    sizes = [tensor.nbytes for tensor in tensors_of(hf).values()]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), str(block_bytes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sum(sizes) > 150 * 10**6
    there, back = map(int, done.stdout.split())
    assert max(there, back) < 8 * block_bytes + 24 * 2**20 < max(sizes)
    assert all(same(tensor, tensors_of(hf)[name]) for name, tensor in list(tensors_of(tmp_path / "back").items())[:5])
