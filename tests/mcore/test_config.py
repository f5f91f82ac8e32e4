"""From config.json and model.megatron to Megatron's settings: what is understood, and what is refused in which words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.errors import ConfigError, GeometryError, RppError
from megatron_rpp.hf.model import parse_model, read_model
from megatron_rpp.mcore.rope import inv_freq
from tests.dist.ranks import run_ranks
from tests.mcore import tiny
from tests.mcore.hf import transformers

LLAMA: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=200,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    rope_theta=500000.0,
)


def parse(**changes: Any):
    return parse_model({**LLAMA, **changes}, where="config.json")


def test_sizes_and_their_defaults_are_read() -> None:
    model = parse()
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (4, 8, 4, 8)
    assert (model.norm_eps, model.is_tied, model.rope.theta, model.rope.type) == (1e-5, False, 500000.0, "default")
    assert parse(num_key_value_heads=None).num_kv_heads == 8
    assert parse(head_dim=24).head_dim == 24
    families = {name: parse(model_type=name).family for name in tiny.KINDS}
    assert [families[name].qkv_bias for name in tiny.KINDS] == [False, True, False]
    assert [families[name].qk_norm for name in tiny.KINDS] == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="mamba"), ["family", "llama | qwen2 | qwen3", "mamba"]),
        (dict(hidden_act="gelu"), ["hidden_act", "silu", "gelu"]),
        (dict(attention_bias=True), ["attention_bias"]),
        (dict(model_type="qwen2", use_sliding_window=True), ["use_sliding_window"]),
        (dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types", "sliding_attention"]),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), ["rope_scaling", "yarn", "llama3"]),
        (dict(partial_rotary_factor=0.5), ["partial"]),
        (dict(quantization_config=dict(bits=4)), ["quantization_config"]),
        (dict(rms_norm_eps="tiny"), ["config.json: rms_norm_eps", "not a number", "tiny"]),
        (dict(num_hidden_layers=[4]), ["config.json: num_hidden_layers", "not a size", "[4]"]),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(**changes)
    assert all(word in str(error.value) for word in ["config.json", *words])


def test_a_missing_entry_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        parse_model({name: value for name, value in LLAMA.items() if name != "vocab_size"}, where="config.json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        dict(rope_type="linear", factor=4.0),
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        dict(rope_type="llama3", factor=32.0, low_freq_factor=2.0, high_freq_factor=3.0, original_max_position_embeddings=128),
    ],
)
@pytest.mark.parametrize("style", [4, 5])
def test_rotary_frequencies_are_those_of_transformers_to_the_bit(scaling: dict[str, Any] | None, style: int) -> None:
    hf = transformers()
    settings = {"rope_theta": 500000.0, "rope_type": "default", **(scaling or {})}
    config = hf.LlamaConfig(**{**LLAMA, "rope_parameters": settings})
    want = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    raw = {"rope_parameters": settings} if style == 5 else {"rope_theta": 500000.0, "rope_scaling": scaling}
    got = parse(**{"rope_theta": None, **raw} if style == 5 else raw)
    assert torch.equal(inv_freq(got.rope, got.head_dim), want)


def _refusals(rank: int, hf: Path) -> dict[str, tuple[str, str]]:
    """Class and words of the error for each bad setting, in one spawn."""
    cases: dict[str, dict[str, Any]] = {
        "misspelt": dict(megatron=dict(recompute_granularty="full")),
        "owned": dict(megatron=dict(tensor_model_parallel_size=2)),
        "per token": dict(megatron=dict(calculate_per_token_loss=False)),
        "type": dict(megatron=dict(recompute_num_layers="two")),
        "bool for int": dict(megatron=dict(recompute_num_layers=True)),
        "refused by megatron": dict(megatron=dict(recompute_granularity="full")),
        "heads": dict(tp=3),
        "kv heads": dict(tp=4),
        "layers": dict(pp=3),
        "virtual": dict(pp=2, vpp=4),
        "groups": dict(megatron=dict(moe_enable_routing_replay=True)),
    }
    from megatron_rpp.mcore.build import transformer_config
    from tests.mcore.test_sparse_config import parse as parse_sparse

    model = read_model(hf)
    said = {}
    for name, case in cases.items():
        shape = replace(model, num_heads=12, num_kv_heads=3) if name == "kv heads" else model
        shape = parse_sparse("deepseek_v2") if name == "groups" else shape
        try:
            transformer_config(shape, tiny.make_config(hf, **case), torch.device("cpu"))
        except RppError as error:
            said[name] = (type(error).__name__, str(error))
        else:
            said[name] = ("nothing", "")
    return said


def _accepted(hf: Path) -> dict[str, Any]:
    from megatron_rpp.mcore.build import padded_vocab_size, transformer_config

    given = dict(recompute_granularity="selective", recompute_modules="core_attn, mlp", attention_backend="unfused", hidden_dropout=0)
    config = transformer_config(read_model(hf), tiny.make_config(hf, megatron=given, tp=2), torch.device("cpu"))
    return {
        "modules": config.recompute_modules,
        "backend": config.attention_backend.name,
        "dropout": config.hidden_dropout,
        "sequence_parallel": config.sequence_parallel,
        "per token": config.calculate_per_token_loss,
        "frees what gloo may still be sending": _virtual_stages(hf).deallocate_pipeline_outputs,
        "vocab": [padded_vocab_size(size, tp) for size, tp in ((200, 1), (200, 2), (256, 2), (257, 1), (128256, 8))],
    }


def _virtual_stages(hf: Path):
    from megatron_rpp.mcore.build import transformer_config

    return transformer_config(read_model(hf), tiny.make_config(hf, pp=2, vpp=2), torch.device("cpu"))


def _settings(rank: int, hf: Path) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    with tiny.megatron(tiny.make_config(hf)):
        return _refusals(rank, hf), _accepted(hf)


@pytest.fixture(scope="module")
def settings(hf_root: Path) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    return run_ranks(1, _settings, hf_root / "qwen3", init=False, timeout_s=150.0)[0]


def test_bad_settings_are_refused_with_their_name_and_a_way_out(settings) -> None:
    said, _ = settings
    for name, (kind, *words) in {
        "misspelt": ("ConfigError", "model.megatron.recompute_granularty", "did you mean recompute_granularity"),
        "owned": ("ConfigError", "model.megatron.tensor_model_parallel_size", "parallel.tp"),
        "per token": ("ConfigError", "calculate_per_token_loss"),
        "type": ("ConfigError", "model.megatron.recompute_num_layers", "int", "'two'"),
        "bool for int": ("ConfigError", "model.megatron.recompute_num_layers", "True"),
        "refused by megatron": ("ConfigError", "Megatron refuses", "recompute_method"),
        "heads": ("GeometryError", "parallel.tp", "4 attention heads"),
        "kv heads": ("GeometryError", "parallel.tp", "3 key-value heads"),
        "layers": ("GeometryError", "parallel.pp", "4 layers", "num_layers_in_first_pipeline_stage"),
        "virtual": ("GeometryError", "pp 2 x vpp 4 = 8"),
        "groups": ("ConfigError", "model.megatron.moe_enable_routing_replay: must be false", "experts by groups"),
    }.items():
        assert said[name][0] == kind, (name, said[name])
        assert all(word in said[name][1] for word in words), (name, said[name])


def test_settings_pass_through_in_their_declared_types(settings) -> None:
    _, got = settings
    assert got == {
        "modules": ["core_attn", "mlp"],
        "backend": "unfused",
        "dropout": 0.0,
        "sequence_parallel": True,
        "per token": True,
        "frees what gloo may still be sending": False,
        "vocab": [256, 256, 256, 384, 129024],
    }


@pytest.mark.parametrize(
    ("sizes", "words"), [(dict(tp=2), ["tp 2 x cp 1 x dp 1 x pp 1 = 2", "1 (single)"]), (dict(vpp=2), ["vpp", "pipeline"])]
)
def test_a_layout_that_does_not_fit_the_processes_is_refused_before_anything_starts(
    sizes: dict[str, int], words: list[str], tmp_path: Path
) -> None:
    from megatron_rpp.dist.world import World
    from megatron_rpp.mcore.init import start

    with pytest.raises(GeometryError) as error:
        start(tiny.make_config(tmp_path, **sizes), World())
    assert all(word in str(error.value) for word in words)
    assert not torch.distributed.is_initialized()


def test_cuda_is_not_silently_replaced_by_the_cpu(tmp_path: Path) -> None:
    from megatron_rpp.dist.world import World
    from megatron_rpp.mcore.init import device_of

    cfg = tiny.make_config(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("this host has CUDA")
    with pytest.raises(ConfigError, match=r"run\.device"):
        device_of(replace(cfg, run=replace(cfg.run, device="cuda")), World())
    assert device_of(cfg, World()) == torch.device("cpu")
