"""HF directories in block FP8: written with the bits of quantising whole tensors, read as weight * scale, refused when they lie."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rpp.errors import CheckpointError, NumericsError
from megatron_rpp.weights import fp8_checkpoint
from megatron_rpp.weights.compare import compare
from megatron_rpp.weights.convert import Options, model_part, to_megatron
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8_checkpoint import Quantised, fp8_part, open_wide, scales_of
from megatron_rpp.weights.hf_io import open_hf, read_json
from megatron_rpp.weights.megatron_checkpoint import open_megatron
from megatron_rpp.weights.quantise import is_quantised, quantise
from megatron_rpp.weights.rect import Rect
from tests.unit.weights.models import ALL_CONFIGS
from tests.unit.weights.test_convert import HEADER, StopHereError, convert, convert_back, make_hf, stopping_after, tensors_of

# Blocks that end inside a matrix, and blocks of files and strips that do not end with blocks of 128.
WIDER = {
    "hidden_size": 168,
    "intermediate_size": 320,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 2,
    "vocab_size": 160,
    "num_local_experts": 2,
}
SMALL = Options(fp8="float32", shard_bytes=150_000, block_bytes=10_000)
PLAIN = Options(shard_bytes=10**6)


def wider(family: str) -> dict[str, Any]:
    config = ALL_CONFIGS[family]
    return {**config, **{key: size for key, size in WIDER.items() if key in config}}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def whole_fp8(hf: Path, **named: Any) -> dict[str, Tensor]:
    """What a directory must hold in FP8, from its whole tensors."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors_of(hf).items():
        if is_quantised(name):
            found[name], found[f"{name}_scale_inv"] = quantise(tensor, **named)
        else:
            found[name] = tensor
    return found


@pytest.fixture(autouse=True)
def _one_row_of_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_checkpoint, "_STRIP_BYTES", 1)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A llama in block FP8, and beside it, as "there", the Megatron checkpoint that it was made of."""
    convert(make_hf(tmp_path / "in", wider("llama")), tmp_path / "there", PLAIN)
    convert_back(tmp_path / "there", tmp_path / "fp8", SMALL)
    return tmp_path / "fp8"


@pytest.mark.parametrize(
    ("family", "scales"),
    [("qwen3, tied, 2 KV heads", "float32"), ("deepseek_v3, router bias", "float32"), ("mixtral", "power_of_two")],
)
def test_an_export_has_the_bits_of_quantising_whole_tensors(tmp_path: Path, family: str, scales: Any) -> None:
    hf = make_hf(tmp_path / "in", wider(family))
    convert(hf, tmp_path / "there", PLAIN)
    result = convert_back(tmp_path / "there", tmp_path / "fp8", replace(SMALL, fp8=scales))
    expected, got = whole_fp8(hf, scales=scales), tensors_of(tmp_path / "fp8")
    assert got.keys() == expected.keys() and result.tensors == len(got) and result.files > 2
    assert result.num_bytes == sum(tensor.nbytes for tensor in got.values())
    assert all(got[name].dtype == tensor.dtype and torch.equal(bits(got[name]), bits(tensor)) for name, tensor in expected.items())
    assert {tensor.dtype for name, tensor in got.items() if name.endswith("scale_inv")} == {torch.float32}
    said = read_json(tmp_path / "fp8" / "config.json")
    assert said["torch_dtype"] == "bfloat16" and scales_of(said) == scales
    quantization = said["quantization_config"]
    assert (quantization["quant_method"], quantization["fmt"], quantization["activation_scheme"]) == ("fp8", "e4m3", "dynamic")
    assert quantization["weight_block_size"] == [128, 128]


def test_a_directory_in_fp8_becomes_the_wide_model_that_it_stands_for(tmp_path: Path, fp8: Path) -> None:
    """Every number is weight * scale of its block, by the definition, rounded to bfloat16 once; and a second way back changes no bit."""
    stored = tensors_of(fp8)
    expected = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name, tensor in expected.items():
        if is_quantised(name):
            scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
            expected[name] = (tensor.float() * scale).to(torch.bfloat16)
    with open_wide(fp8) as source:
        assert "quantization_config" not in source.config
        for row, col, rows, cols in ((100, 120, 60, 30), (130, 250, 30, 60)):
            part = Rect("model.layers.1.mlp.down_proj.weight", row, col, rows, cols)
            assert torch.equal(source.read(part), expected[part.hf][row : row + rows, col : col + cols])
        to_megatron(source, describe(source.config), tmp_path / "again", header=HEADER, options=PLAIN)
    assert "quantization_config" not in read_json(tmp_path / "again" / "hf" / "config.json")
    convert_back(tmp_path / "again", tmp_path / "wide", PLAIN)
    wide = tensors_of(tmp_path / "wide")
    assert wide.keys() == expected.keys() and all(torch.equal(bits(wide[name]), bits(tensor)) for name, tensor in expected.items())


def test_both_forms_compare_with_the_model_that_they_came_from(tmp_path: Path, fp8: Path) -> None:
    """As tools/verify_checkpoint.py does: the wide side quantised equals the directory, and the directory dequantised is near it."""
    with open_hf(fp8) as stored, open_wide(fp8) as wide, open_megatron(tmp_path / "there", describe(wide.config)) as saved:
        shapes = describe(wide.config).hf_shapes
        made = Quantised(saved, shapes, {name: entry.dtype for name, entry in saved.entries.items()}, "float32")
        assert compare(made, fp8_part(stored, shapes)) is None
        assert compare(fp8_part(stored, shapes), made) is None
        found = compare(saved, model_part(wide, describe(wide.config)))
        assert found is not None and is_quantised(found.tensor) and found.left == pytest.approx(found.right, rel=0.07)


def test_a_cut_off_export_is_gone_on_with_and_other_scales_start_again(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "in", wider("llama")), tmp_path / "there", PLAIN)
    with pytest.raises(StopHereError):
        convert_back(tmp_path / "there", tmp_path / "out", replace(SMALL, tick=stopping_after(60)))
    done = len(list((tmp_path / ".out.unfinished").glob("*.safetensors")))
    assert done >= 2
    assert convert_back(tmp_path / "there", tmp_path / "out", SMALL).resumed_files == done
    with pytest.raises(StopHereError):
        convert_back(tmp_path / "there", tmp_path / "other", replace(SMALL, tick=stopping_after(60)))
    assert convert_back(tmp_path / "there", tmp_path / "other", replace(SMALL, fp8="power_of_two")).resumed_files == 0


def test_a_bit_that_the_disk_turns_in_a_scale_is_found(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "in", wider("llama"))
    convert(hf, tmp_path / "there", PLAIN)
    needle = bits(whole_fp8(hf)["model.layers.1.mlp.up_proj.weight_scale_inv"]).numpy().tobytes()
    flipped: list[bool] = []

    def flip(what: str, num_bytes: int) -> None:
        for file in () if what != "compare" or flipped else (tmp_path / ".out.unfinished").glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            if needle in content:
                content[content.index(needle) + 2] ^= 1
                file.write_bytes(content)
                flipped.append(True)

    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv: element \[0, 0\] is not what was read"):
        convert_back(tmp_path / "there", tmp_path / "out", replace(SMALL, tick=flip))
    assert flipped and not (tmp_path / "out").exists()


def test_a_weight_without_an_fp8_form_is_named(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "in", wider("llama"))
    name = "model.layers.1.self_attn.o_proj.weight"
    file = next(file for file in hf.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][150, 3] = torch.nan
    save_file(tensors, file)
    convert(hf, tmp_path / "there", PLAIN)
    with pytest.raises(NumericsError, match=rf"{name}.*: not finite"):
        convert_back(tmp_path / "there", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def edit_config(folder: Path, **change: Any) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"] = {**config["quantization_config"], **change}
    (folder / "config.json").write_text(json.dumps(config))


def edit_scales(folder: Path, change: Callable[[dict[str, Tensor], str], object]) -> None:
    """Of one weight, in the file and in the index."""
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    index = read_json(folder / "model.safetensors.index.json")
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    change(tensors, name)
    os.unlink(file)
    save_file(tensors, file)
    if name not in tensors:
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scales": (lambda f: edit_scales(f, lambda t, n: t.pop(n)), "up_proj.weight is in FP8 and has no scales"),
    "one scale": (lambda f: edit_scales(f, lambda t, n: t.update({n: t[n][:1, :1].clone()})), "up_proj.weight has other scales"),
    "other blocks": (lambda f: edit_config(f, weight_block_size=[1, 128]), "config.json: quantised in a way that is not read here"),
    "other method": (lambda f: edit_config(f, quant_method="awq"), "config.json: quantised in a way that is not read here"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_directory_that_lies_is_refused(fp8: Path, damage: str) -> None:
    change, message = HOSTILE[damage]
    change(fp8)
    with pytest.raises(CheckpointError, match=message):
        open_wide(fp8)


def test_a_model_is_never_filled_with_numbers_that_lack_their_scales(fp8: Path) -> None:
    """Nor is a directory without a quantization_config taken for a wide one."""
    config = read_json(fp8 / "config.json")
    del config["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(config))
    with open_wide(fp8) as stored, pytest.raises(CheckpointError, match=r"weight is in FP8\n.*\n.*tools/convert_hf_to_megatron"):
        stored.check(describe(stored.config).hf_shapes, ("_scale_inv",))
