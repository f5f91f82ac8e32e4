"""What counts as equal when two checkpoints are compared."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rpp.weights.compare import compare
from megatron_rpp.weights.hf_io import open_hf, save_hf
from tests.unit.weights.models import ALL_CONFIGS, write_source


def test_not_a_number_equals_itself_and_minus_zero_is_not_zero(tmp_path: Path) -> None:
    def write(name: str, *values: float) -> Path:
        source = write_source(tmp_path / f"{name} config", ALL_CONFIGS["llama"])
        save_hf(tmp_path / name, [("a", torch.tensor(values))], shapes={"a": (len(values),)}, dtype=torch.float32, source=source)
        return tmp_path / name

    with open_hf(write("nan", float("nan"), 0.0)) as left, open_hf(write("same", float("nan"), 0.0)) as right:
        assert compare(left, right) is None
    with open_hf(tmp_path / "nan") as left, open_hf(write("minus", float("nan"), -0.0)) as right:
        assert compare(left, right).what == "element [1]"
