from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

QWEN = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("a/b.yaml", text) -> its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def project(write: Write, tmp_path: Path) -> Path:
    """A run.yaml whose settings all hold, with the model and the data that it names."""
    write("model/config.json", json.dumps(QWEN))
    write("train.jsonl", "")
    return write("run.yaml", "model: {hf: model, dtype: float32}\ndata: {train: train.jsonl}\nrun: {device: cpu}\n")
