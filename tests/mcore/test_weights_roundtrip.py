"""The weights package on real Megatron modules: every parameter is described, placed where Megatron wants it, and comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.hf_io import open_hf
from megatron_rpp.weights.rect import Rect, as_matrix
from tests.dist.ranks import run_ranks
from tests.mcore import tiny
from tests.mcore.hf import transformers as import_transformers
from tests.unit.weights.oracle import megatron_shard

LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tp2 pp2 vpp2": ({"tp": 2, "pp": 2, "vpp": 2}, {}),
    "pp2, one layer and three": ({"pp": 2}, {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}),
}
HELD = {"tp2 pp2 vpp2": ([0, 2], [1, 3]), "pp2, one layer and three": ([0], [1, 2, 3])}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in tiny.KINDS:
        tiny.make_hf(folder / kind, kind)
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    with open_hf(folder) as checkpoint:
        whole = {name: Rect(name, 0, 0, *as_matrix(entry.shape)) for name, entry in checkpoint.entries.items()}
        return {name: checkpoint.read(rect).view(checkpoint.entries[name].shape) for name, rect in whole.items()}


def round_trip(rank: int, root: Path, layout: str) -> None:
    """Load, compare every live parameter with the oracle, gather on rank 0, export."""
    from megatron_rpp.weights.export import export_hf

    sizes, overrides = LAYOUTS[layout]
    with tiny.megatron(tiny.make_config(root / "llama", **sizes)) as groups:
        for kind in tiny.KINDS:
            cfg = tiny.make_config(root / kind, **sizes)
            cfg = replace(cfg, model=replace(cfg.model, megatron=overrides))
            policy = tiny.open_policy(cfg, groups, trainable=False)
            live, checkpoint = tiny.live_view(policy, cfg)
            hf, at = read_all(root / kind), groups.coords
            layers, ends = HELD[layout][at.pp], "first" if at.pp == 0 else "last"
            expected = megatron_shard(checkpoint.config, hf, groups.tp_size, at.tp, layers, ends)
            assert live.tensors.keys() == expected.keys()
            for name, tensor in live.tensors.items():
                assert torch.equal(tensor, expected[name].nan_to_num(0.0)), (kind, name)
            found = tiny.weights_as_hf(policy, cfg)
            assert found.keys() == (hf.keys() if rank == 0 else set())
            assert all(torch.equal(found[name], hf[name]) for name in found)
            export_hf(live, root / f"{kind}, {layout}", source=root / kind, deadline_s=60.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_modules_load_and_export_hf_bitwise(root: Path, layout: str) -> None:
    sizes, _ = LAYOUTS[layout]
    run_ranks(sizes.get("tp", 1) * sizes["pp"], round_trip, root, layout, init=False, timeout_s=240.0)
    transformers = import_transformers()
    for kind in tiny.KINDS:
        before = transformers.AutoModelForCausalLM.from_pretrained(root / kind, dtype="auto").state_dict()
        after = transformers.AutoModelForCausalLM.from_pretrained(root / f"{kind}, {layout}", dtype="auto").state_dict()
        assert before.keys() == after.keys()
        assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before), kind


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_names_and_shapes_of_a_family_are_those_of_transformers(kind: str, is_tied: bool) -> None:
    transformers = import_transformers()
    config = transformers.AutoConfig.for_model(
        kind, num_hidden_layers=2, hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=101, tie_word_embeddings=is_tied,
    )  # fmt: skip
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if not (is_tied and name == "lm_head.weight")}
    assert describe(config.to_dict()).hf_shapes == expected
