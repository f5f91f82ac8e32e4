"""One live engine for each family with experts or latent attention: loaded, asked, and given new weights by both paths."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_rpp.delivery import announce
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.request import Completion, Request
from megatron_rpp.rollout.settings import EngineSettings
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.mcore import sparse
from tests.mcore.hf import transformers
from tests.sglang import tiny
from tests.sglang.conftest import START_S

TOLERANCE = 1e-5
PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
# (model of tests/mcore/sparse.py, what is changed in its config.json): latent attention with yarn and with plain positions,
# queries projected through a bottleneck and at once, experts chosen by groups, by a biased score, and beside a gated shared one.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v2": ("deepseek_v2 lite", {"rope_parameters": PLAIN, "n_group": 4, "topk_group": 2}),
    "qwen2_moe": ("qwen2_moe", {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 64}),
}


@dataclass(frozen=True)
class Live:
    """An engine, transformers' model of what it loaded, and one with other weights."""

    engine: Engine
    config: dict[str, Any]
    model: nn.Module
    other: nn.Module

    def hf(self, model: nn.Module) -> dict[str, Tensor]:
        return sparse.as_in_files(dict(tiny.state(model)), self.config["model_type"])


@pytest.fixture(scope="module", params=FAMILIES)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    kind, changes = FAMILIES[request.param]
    family, sizes = sparse.MODELS[kind]
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sparse.MODELS, kind, (family, sizes | changes))
        sparse.make_hf(folder, kind)
    model = sparse.correct(transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(0.95).add_(torch.randn_like(tensor) * 0.03)
    settings = EngineSettings(hf=str(folder), max_concurrent=16, max_sequence_tokens=100)
    with Engine.start(settings, log=folder / "engine.log", deadline_s=START_S, version=0) as engine:
        yield Live(engine, json.loads((folder / "config.json").read_text()), model, other)


def _gap(model: nn.Module, asked: Sequence[Request], done: dict[str, Completion]) -> float:
    pairs = [(done[each.key].logp, tiny.logp_of(model, each.tokens, done[each.key].tokens)) for each in asked]
    return max(abs(a - b) for got, expected in pairs for a, b in zip(got, expected, strict=True))


def _publish_shards(live: Live, model: nn.Module, version: int) -> None:
    """As the direct path does: each piece of each parameter of the engine's only rank under its place there."""
    locals_ = SGLangLayout(describe(live.config), tp=1, dtype=torch.float32).locals(0)
    hf = {name: tensor if tensor.dim() == 2 else tensor[:, None] for name, tensor in live.hf(model).items()}
    places = [(local.name, piece) for local in locals_ for piece in local.pieces]
    parts = []
    for name, piece in places:
        rect = piece.rect
        part = hf[rect.hf][rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols]
        parts.append(([name, list(piece.index), piece.row, piece.col], part))
    with live.engine.update_shards(version, [announce(locals_)]) as load:
        load([live.engine._outbox.pack(parts)])


def test_an_engine_of_the_family_is_transformers_model_before_and_after_updates_by_both_paths(live: Live) -> None:
    engine, asked = live.engine, tiny.requests(8, max_tokens=24)
    sequences = [tiny.prompt_of(i, 5 + 8 * i) for i in range(4)]
    for tokens, logp in zip(sequences, engine.score(sequences), strict=True):
        assert logp[1:] == pytest.approx(tiny.logp_of(live.model, tokens[:1], tokens[1:]), abs=TOLERANCE)
    first = tiny.sample(engine, asked)
    assert _gap(live.model, asked, first) < TOLERANCE
    _publish_shards(live, live.other, 1)
    new = tiny.sample(engine, asked)
    assert _gap(live.other, asked, new) < TOLERANCE
    assert _gap(live.model, asked, new) > 0.1
    # Every third tensor in a call of its own: parts of one parameter of SGLang's come in different ones.
    tiny.publish(engine, list(live.hf(live.model).items()), 2)
    again = tiny.sample(engine, asked)
    assert {key: done.logp for key, done in again.items()} == {key: done.logp for key, done in first.items()}


def test_a_seed_gives_the_same_bits_alone_and_in_any_batch_of_the_family(live: Live) -> None:
    asked = tiny.requests(8, max_tokens=16)
    together = tiny.sample(live.engine, asked)
    for each in asked[:4]:
        assert tiny.sample(live.engine, [each])[each.key] == together[each.key]
