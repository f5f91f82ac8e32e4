"""Checkpoints have Transformer Engine's keys and do not depend on the layout that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.ranks import run_ranks
from tests.patches.test_layouts import GPT, MLA, MOE
from tests.patches.tiny import Layout, build, gather_full, name_of, start, stop, weight

WRITTEN = {
    "gpt": Layout(tp=2, options=GPT),
    "moe": Layout(ep=2, options=MOE),
    "mla": Layout(tp=2, options=MLA),
}
READ = {"gpt": Layout(pp=2, options=GPT), "moe": Layout(tp=2, options=MOE), "mla": Layout(options=MLA)}

QKV = ("linear_proj.weight", "linear_qkv.weight", "linear_qkv.layer_norm_weight")
LATENT = (
    "linear_proj.weight",
    *(f"linear_{part}.weight" for part in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj")),
    *(f"linear_{part}.layer_norm_weight" for part in ("q_up_proj", "kv_up_proj")),
)
MLP = {"mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc2.weight"}
BIASES = {"self_attention.linear_qkv.layer_norm_bias", "mlp.linear_fc1.layer_norm_bias"}
EXPERTS = {f"mlp.experts.experts.linear_fc{layer}.weight" for layer in (1, 2)}
KEYS = {
    "gpt": {f"self_attention.{name}" for name in QKV} | MLP | BIASES,
    "moe": {f"self_attention.{name}" for name in QKV} | EXPERTS | {"pre_mlp_layernorm.weight", "mlp.router.weight"},
    "mla": {f"self_attention.{name}" for name in LATENT} | MLP | {"input_layernorm.weight"},
}


def state_of(model: Any) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.module.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})


def write_and_read(rank: int, family: str, folder: Path) -> tuple[set[str], list[str]]:
    """The keys that were written, and the parameters that came back otherwise."""
    from megatron_rpp_patches import apply

    apply("megatron_core")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    start(WRITTEN[family])
    state = state_of(build(WRITTEN[family]))
    keys = {entry.key for entry in state.values() if not isinstance(entry, ShardedObject)}
    objects = {entry.key for entry in state.values() if isinstance(entry, ShardedObject)}
    dist_checkpointing.save(state, str(folder))
    stop()
    dist.barrier()

    start(READ[family])
    model = build(READ[family])
    for param in model.parameters():
        param.data.fill_(7.0)
    model.module.load_state_dict(dist_checkpointing.load(state_of(model), str(folder)))
    wrong = []
    for local, param in model.module.named_parameters():
        whole, name = gather_full(param.data, local, param), name_of(model.module, local)
        if not torch.equal(whole, weight(name, list(whole.shape))):
            wrong.append(name)
    stop()
    return keys | {f"object {key}" for key in objects}, wrong


@pytest.fixture(scope="module", params=list(WRITTEN))
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, set[str], list[str]]:
    family, folder = request.param, tmp_path_factory.mktemp("checkpoint") / "model"
    folder.mkdir()
    results = run_ranks(2, write_and_read, family, folder, timeout_s=150)
    return family, set().union(*(keys for keys, _ in results)), [name for _, wrong in results for name in wrong]


def test_weights_written_on_one_layout_are_read_on_another_to_the_bit(outcome: tuple[str, set[str], list[str]]) -> None:
    assert outcome[2] == []


def test_the_keys_are_those_of_transformer_engine(outcome: tuple[str, set[str], list[str]]) -> None:
    """Weights as named, and an object for the (absent) fp8 state of every linear layer."""
    family, keys, _ = outcome
    layers = {key.replace("decoder.layers.", "") for key in keys if "decoder.layers." in key}
    assert {key for key in layers if not key.startswith("object ")} == KEYS[family]
    states = {key.removeprefix("object ").rpartition(".")[0] for key in layers if key.startswith("object ")}
    assert states >= {key.rpartition(".")[0] for key in KEYS[family] if "linear_" in key}
