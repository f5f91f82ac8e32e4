"""A tied model whose files hold a head as well: an equal one is accepted, any other refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights import tied_head
from megatron_rpp.weights.convert import model_part
from megatron_rpp.weights.hf_io import HFCheckpoint, open_hf
from megatron_rpp.weights.rect import Rect
from megatron_rpp.weights.tied_head import EMBEDDING, HEAD, check_directory, check_tied_head, head_note
from tests.unit.weights.models import CONFIGS, model_of, random_hf, write_source

TIED, UNTIED = "qwen3, tied, 2 KV heads", "llama"


def directory(folder: Path, name: str, head: Tensor | None, dtype: torch.dtype = torch.float32) -> Path:
    """The model `name`, and beside its own tensors a head."""
    write_source(folder, CONFIGS[name])
    tensors = random_hf(model_of(name), dtype)
    if head is not None:
        tensors[HEAD] = head
    save_file(tensors, folder / "model.safetensors")
    return folder


def embedding(dtype: torch.dtype = torch.float32) -> Tensor:
    return random_hf(model_of(TIED), dtype)[EMBEDDING].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_head_and_an_equal_head_are_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    check_directory(directory(tmp_path / "none", TIED, None, dtype))
    check_directory(directory(tmp_path / "equal", TIED, embedding(dtype), dtype))
    check_directory(directory(tmp_path / "wider", TIED, embedding(dtype).double(), dtype))


def test_an_untied_model_has_a_head_of_its_own(tmp_path: Path) -> None:
    folder = directory(tmp_path / "untied", UNTIED, None)
    check_directory(folder)
    with open_hf(folder) as checkpoint:
        assert head_note(checkpoint.entries, model_of(UNTIED)) == "head: lm_head.weight is a tensor of its own"


@pytest.mark.parametrize("row", [0, 150, 300])
def test_one_element_that_differs_is_found_and_both_tensors_are_named(tmp_path: Path, row: int) -> None:
    head = embedding()
    wanted, head[row, 5] = head[row, 5].item(), 3.5
    with pytest.raises(CheckpointError) as error:
        check_directory(directory(tmp_path / "model", TIED, head))
    said = str(error.value)
    assert "model.safetensors: lm_head.weight differs from model.embed_tokens.weight, but config.json ties the two" in said
    assert f"expected: {wanted} at row {row}, column 5, as in model.embed_tokens.weight\n  got: 3.5" in said
    assert '"tie_word_embeddings": false' in said and "remove lm_head.weight" in said


@pytest.mark.parametrize(
    "change",
    [lambda head: head[:-1].clone(), lambda head: head.bfloat16(), lambda head: torch.full_like(head, float("nan"))],
    ids=["fewer rows", "rounded", "not a number"],
)
def test_another_shape_and_other_values_are_refused(tmp_path: Path, change) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_directory(directory(tmp_path / "model", TIED, change(embedding())))


def test_reading_stops_at_the_first_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of some rows: rows 0 to 9, then 10 to 19, where the difference is, and no more."""
    head, read = embedding(), []
    head[12] += 1
    folder, whole = directory(tmp_path / "model", TIED, head), HFCheckpoint.read
    monkeypatch.setattr(HFCheckpoint, "read", lambda self, rect: read.append(rect) or whole(self, rect))
    monkeypatch.setattr(tied_head, "BLOCK_BYTES", 10 * head.shape[1] * 4)
    with open_hf(folder) as checkpoint, pytest.raises(CheckpointError, match="at row 12, column 0"):
        check_tied_head(checkpoint, model_of(TIED))
    assert read == [Rect(name, row, 0, 10, head.shape[1]) for row in (0, 10) for name in (HEAD, EMBEDDING)]


def test_a_conversion_refuses_the_head_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    with open_hf(directory(tmp_path / "other", TIED, -embedding())) as checkpoint, pytest.raises(CheckpointError, match="ties the two"):
        model_part(checkpoint, model_of(TIED))
    with open_hf(directory(tmp_path / "equal", TIED, embedding())) as checkpoint:
        assert HEAD not in model_part(checkpoint, model_of(TIED)).entries
        assert (
            head_note(checkpoint.entries, model_of(TIED)) == "head: tied; lm_head.weight equals model.embed_tokens.weight and is left out"
        )
    with open_hf(directory(tmp_path / "none", TIED, None)) as checkpoint:
        assert head_note(checkpoint.entries, model_of(TIED)) == "head: tied to model.embed_tokens.weight; there is no lm_head.weight"


def test_a_quantized_directory_is_compared_too(tmp_path: Path) -> None:
    """`rpp eval` lets the engine read it."""
    config = CONFIGS[TIED] | {"quantization_config": {"quant_method": "gptq"}}
    for name, head in (("equal", embedding()), ("other", embedding() + 1)):
        folder = directory(tmp_path / name, TIED, head)
        (folder / "config.json").write_text(json.dumps(config))
    check_directory(tmp_path / "equal")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs"):
        check_directory(tmp_path / "other")
