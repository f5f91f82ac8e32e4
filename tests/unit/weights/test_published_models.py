"""The configs in examples/models describe models of the published sizes, to the last parameter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.weights.families.registry import describe

FOLDER = Path(__file__).parents[3] / "examples" / "models"
# As counted in the safetensors files of the published checkpoints. DeepSeek-V3: without the layer that predicts a further
# token, which is the 671B of its paper; published in float8, described as the bfloat16 model that it is converted to.
PARAMETERS = {
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-32b": 32_762_123_264,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_419_200,
}


def test_every_config_is_counted() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_config_describes_a_model_of_the_published_size(name: str) -> None:
    model = describe(json.loads((FOLDER / f"{name}.json").read_text()))
    assert model.num_parameters == PARAMETERS[name]
