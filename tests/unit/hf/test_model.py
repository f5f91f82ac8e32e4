"""The description of a model against transformers: parameters, and what an absent entry means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.errors import ConfigError
from megatron_rpp.hf.model import HfModel, parse_model, read_model
from megatron_rpp.weights.families.registry import describe
from tests.mcore.hf import transformers
from tests.unit.hf.configs import VARIANTS, config_of, raw_of

PUBLISHED = sorted((Path(__file__).parents[3] / "examples" / "models").glob("*.json"))


def allocated(config: Any) -> int:
    """Parameters that transformers allocates; a tensor that two modules share counts once."""
    with torch.device("meta"):
        model = transformers().AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_parameter_count_is_that_of_transformers(name: str, is_tied: bool) -> None:
    config = config_of(name, tie_word_embeddings=is_tied)
    assert parse_model(config.to_dict(), where="config.json").num_parameters == allocated(config)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_parameter_count_of_each_published_example_is_that_of_transformers(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(path.read_text())
    assert read_model(tmp_path).num_parameters == allocated(transformers().AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weights_mapping_describes_as_many_parameters(name: str) -> None:
    """The mapping also moves the routers' biases, which transformers keeps as buffers."""
    raw = raw_of(name)
    model = describe(raw)
    biases = sum(shape[0] for tensor, shape in model.hf_shapes.items() if tensor.endswith("e_score_correction_bias"))
    assert model.num_parameters - biases == parse_model(raw, where="config.json").num_parameters


def parsed(raw: dict[str, Any]) -> HfModel | ConfigError:
    try:
        return parse_model(raw, where="config.json")
    except ConfigError as error:
        return error


REQUIRED = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_absent_entry_means_what_transformers_takes_or_is_refused(name: str) -> None:
    """Each entry is left out in turn, tie_word_embeddings and head_dim among them."""
    raw, compared = raw_of(name), 0
    for entry in raw:
        less = {key: value for key, value in raw.items() if key != entry}
        found = parsed(less)
        if isinstance(found, ConfigError):
            assert f"config.json: {entry}" in str(found), entry
            continue
        assert entry not in REQUIRED
        completed = transformers().AutoConfig.for_model(**less).to_dict()
        if found.latent is not None:
            completed["head_dim"] = less.get("head_dim")  # of ordinary attention; derived differently for latent attention
        assert found == parse_model(completed, where="config.json"), entry
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("name", VARIANTS)
def test_a_family_is_untied_unless_its_config_says_so(name: str) -> None:
    raw = raw_of(name)
    del raw["tie_word_embeddings"]
    assert transformers().AutoConfig.for_model(**raw).tie_word_embeddings is False
    assert parse_model(raw, where="config.json").is_tied is False
    assert describe(raw).dims.is_tied is False


ROPE = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("entries", "theta", "kind"),
    [
        ({"rope_theta": 5e5}, 5e5, "default"),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, "default"),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, "linear"),
        ({"rope_parameters": ROPE}, 5e5, "default"),
        ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, 5e5, "linear"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5, "default"),
        ({}, 1e4, "default"),
    ],
)
def test_both_forms_of_the_rotary_settings_are_read(entries: dict[str, Any], theta: float, kind: str) -> None:
    raw = raw_of("qwen3, norms and wide heads")
    del raw["rope_parameters"]
    rope = parse_model({**raw, **entries}, where="config.json").rope
    assert (rope.theta, rope.type) == (theta, kind)


@pytest.mark.parametrize("entry", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "layers", [{"full_attention": ROPE}, {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}]
)
def test_rotary_settings_per_layer_type_are_refused(entry: str, layers: dict[str, Any]) -> None:
    raw = {**raw_of("qwen3, norms and wide heads"), "rope_parameters": None, entry: layers}
    with pytest.raises(ConfigError) as error:
        parse_model(json.loads(json.dumps(raw)), where="config.json")
    assert f"config.json: {entry}: rotary settings per layer type are not supported" in str(error.value)
    assert f"a set each for {', '.join(layers)}" in str(error.value)


SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("kind", "entry"), [(kind, entry) for kind, entries in SCALED.items() for entry in entries])
def test_a_rotary_scaling_without_one_of_its_entries_is_refused(form: str, kind: str, entry: str) -> None:
    settings = {"rope_type": kind, "rope_theta": 5e5, **SCALED[kind]}
    raw = {**raw_of("llama"), "rope_parameters": None, form: settings}
    assert parse_model(raw, where="config.json").rope.factor == SCALED[kind]["factor"]
    for absent in ({name: value for name, value in settings.items() if name != entry}, {**settings, entry: None}):
        with pytest.raises(ConfigError) as error:
            parse_model({**raw, form: absent}, where="config.json")
        assert f"config.json: {form}: {entry}: this entry is missing" in str(error.value)


@pytest.mark.parametrize("entry", ["rms_norm_eps", "rope_theta", "partial_rotary_factor", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_too_large_for_a_float_is_refused(entry: str, sign: int) -> None:
    raw = {name: value for name, value in raw_of("llama").items() if name != "rope_parameters"}
    text = json.dumps({**raw, entry: 0}).replace(f'"{entry}": 0', f'"{entry}": {sign * 10**400}')
    with pytest.raises(ConfigError) as error:
        parse_model(json.loads(text), where="config.json")
    said = str(error.value)
    assert f"config.json: {entry}: this entry is not a " in said and "got: " in said
    assert max(map(len, said.splitlines())) < 110


@pytest.mark.parametrize("wrong", [[1], "1", -1, 1.0, True, None, {}])
@pytest.mark.parametrize("name", ["qwen2_moe, shared expert", "qwen3_moe"])
def test_a_dense_layer_that_is_no_layer_number_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError) as error:
        parse_model({**raw_of(name), "mlp_only_layers": [1, wrong]}, where="config.json")
    assert "config.json: mlp_only_layers: this entry is not a list of layer numbers\n  expected: " in str(error.value)
    assert f"got: {wrong!r}" in str(error.value)
