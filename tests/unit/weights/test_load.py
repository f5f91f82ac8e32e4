"""HF directory on disk -> Megatron-shaped tensors, read by rectangle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rpp.weights.hf_io import HFCheckpoint, open_hf, save_hf
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.load import fill_locals
from megatron_rpp.weights.rect import Rect
from tests.unit.weights.models import CONFIGS, blank, model_of, random_hf, same, write_source
from tests.unit.weights.oracle import megatron_shard


def on_disk(folder: Path, name: str, dtype: torch.dtype, shard_bytes: int = 20_000) -> Path:
    model = model_of(name)
    source = write_source(folder / "source", CONFIGS[name])
    tensors = random_hf(model, dtype).items()
    save_hf(folder / "model", tensors, shapes=model.hf_shapes, dtype=dtype, source=source, shard_bytes=shard_bytes)
    return folder / "model"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 4])
def test_each_rank_loads_what_the_oracle_cuts_and_zeroes_the_padding(tmp_path: Path, name: str, tp: int) -> None:
    model = model_of(name)
    folder, hf = on_disk(tmp_path, name, torch.float32), random_hf(model)
    layout = MegatronLayout.even(model, tp=tp, pp=2, dtype=torch.float32)
    with open_hf(folder) as checkpoint:
        checkpoint.check(model.hf_shapes)
        for rank in range(layout.ranks):
            tensors = blank(layout.locals(rank))
            fill_locals(layout.locals(rank), tensors, checkpoint)
            layers, ends = (list(range(4)), "first") if rank < tp else (list(range(4, 8)), "last")
            for key, expected in megatron_shard(CONFIGS[name], hf, tp, rank % tp, layers, ends).items():
                assert same(tensors[key], expected.nan_to_num(0.0)), key


@pytest.mark.parametrize(
    ("stored", "live"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_weights_are_cast_to_the_live_dtype(tmp_path: Path, stored: torch.dtype, live: torch.dtype) -> None:
    model = model_of("llama")
    layout = MegatronLayout.even(model, tp=1, dtype=live)
    tensors = blank(layout.locals(0))
    with open_hf(on_disk(tmp_path, "llama", stored)) as checkpoint:
        fill_locals(layout.locals(0), tensors, checkpoint)
    norm = random_hf(model, stored)["model.norm.weight"]
    assert same(tensors["decoder.final_layernorm.weight"], norm.to(live))


def test_each_rank_reads_only_its_own_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tp 4 x pp 2: the matrices are read once over all ranks, the norms of a stage by each of its four."""
    read: list[Rect] = []
    whole = HFCheckpoint.read
    monkeypatch.setattr(HFCheckpoint, "read", lambda self, rect: read.append(rect) or whole(self, rect))
    model = model_of("llama")
    layout = MegatronLayout.even(model, tp=4, pp=2, dtype=torch.float32)
    with open_hf(on_disk(tmp_path, "llama", torch.float32)) as checkpoint:
        for rank in range(8):
            fill_locals(layout.locals(rank), blank(layout.locals(rank)), checkpoint)
    matrices = sum(torch.Size(shape).numel() for shape in model.hf_shapes.values() if len(shape) == 2)
    norms = sum(shape[0] for shape in model.hf_shapes.values() if len(shape) == 1)
    assert sum(rect.area for rect in read) == matrices + 4 * norms
