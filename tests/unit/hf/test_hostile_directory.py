"""A model's directory that would block its reader, never end, or say one thing to one reader and another to the next."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_rpp.__main__ import main
from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights.hf_io import open_hf
from tests.unit.fuzz import QWEN, project
from tests.unit.odd_files import ODD_FILES, Make, make_sparse

SPECIAL = {name: ODD_FILES[name] for name in ("a pipe", "/dev/zero")} | {"1 TiB": (make_sparse, "1,099,511,627,776 bytes")}
NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template.jinja",
)


def check(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    start = time.monotonic()
    code = main(["check", "run.yaml"])
    assert time.monotonic() - start < 30
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("make", "reason"), SPECIAL.values(), ids=SPECIAL)
def test_a_file_that_cannot_be_read_whole_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], name: str, make: Make, reason: str
) -> None:
    with project() as folder:
        (folder / "model" / name).unlink(missing_ok=True)
        make(folder / "model" / name)
        code, complaint = check(capsys)
    assert code in (1, 2)
    assert f"{folder}/model/{name}: " in complaint
    assert reason in complaint


CONTENTS = {
    "config.json": {
        '{"hidden_size": 8, ' + json.dumps(QWEN)[1:]: "the name 'hidden_size' is given twice",
        json.dumps(QWEN | {"bos_token_id": float("inf")}): "Infinity is not a JSON number",
        json.dumps(QWEN).replace("64", "1e999"): "1e999 is beyond the range of a float",
        json.dumps(
            QWEN | {"num_hidden_layers": 10**15}
        ): "num_hidden_layers: this entry is not a size\n      expected: a whole number of at most",
        json.dumps(QWEN | {"rope_scaling": {"rope_type": []}}): "this rotary scaling is not supported",
        "[" * 100_000: "nested more than 64 levels deep",
    },
    "generation_config.json": {
        '{"eos_token_id": Infinity}': "Infinity is not a JSON number",
        '{"eos_token_id": 1, "eos_token_id": 2}': "the name 'eos_token_id' is given twice",
        '{"a":' * 50_000: "nested more than 64 levels deep",
        '{"eos_token_id": "\\u001b[31m"}': "got: '\\x1b[31m'",
    },
    "tokenizer_config.json": {
        '{"eos_token": "\\ud800"}': "half of a surrogate pair",
        "[" * 100_000: "nested more than 64 levels deep",
        "\ufeff{}": "BOM",
    },
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in CONTENTS.items() for text in texts])
def test_json_that_readers_would_understand_differently_is_refused(capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    with project() as folder:
        (folder / "model" / name).write_text(text)
        code, complaint = check(capsys)
    assert code in (1, 2)
    assert name in complaint
    assert CONTENTS[name][text] in complaint


@pytest.mark.parametrize("config", [{"added_tokens_decoder": {"a": 3}, "extra_special_tokens": 7}, {"additional_special_tokens": 5}])
def test_tokens_of_wrong_types_in_a_tokenizers_configuration_do_no_harm(
    capsys: pytest.CaptureFixture[str], config: dict[str, object]
) -> None:
    with project() as folder:
        (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
        assert check(capsys)[0] == 0


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {
    "deep": ("[" * 100_000, "nested more than 64 levels deep"),
    "Infinity": (ENTRY.replace("[1]", "[Infinity]"), "Infinity is not a JSON number"),
    "a name twice": (f'{{"a": {ENTRY}, "a": {ENTRY}}}', "the name 'a' is given twice"),
    "a huge shape": (f'{{"a": {ENTRY}}}'.replace("[1]", "[1" + "0" * 4000 + "]"), "a has no proper dtype, shape and offsets"),
    "many sides": (f'{{"a": {ENTRY}}}'.replace("[1]", f"[{', '.join(['9'] * 65)}]"), "a has no proper dtype, shape and offsets"),
    "a dtype that is a list": (f'{{"a": {ENTRY}}}'.replace('"F32"', "[]"), "a has no proper dtype, shape and offsets"),
    "control characters": (f'{{"\\u001b[31ma": {ENTRY}}}'.replace("F32", "F31"), r"\\u001b\[31ma is not of a dtype"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_of_a_weights_file_is_one_message(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=message):
        open_hf(tmp_path)


def test_a_shard_that_is_a_pipe_or_has_no_possible_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "p.safetensors")
    for name, reason in (("p", "a named pipe, not a regular file"), ("\\u0000", "no file can have this name")):
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}.safetensors"}}}}')
        with pytest.raises(CheckpointError, match=f"cannot read the file\n  got: {reason}"):
            open_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="the name 'a' is given twice"):
        open_hf(tmp_path)
