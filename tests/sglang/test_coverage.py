"""What a scheduler process accepts of shards; no engine needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_rpp.rollout.coverage import Shards, open_update
from megatron_rpp.rollout.memory import Outbox
from megatron_rpp.rollout.settings import FOLDER_VARIABLE

Part = tuple[list[object], Tensor]
ANNOUNCED = {"embed": ([6, 4], 20), "experts": ([2, 3, 4], 24), "norm": ([4], 4)}


class Model(nn.Module):
    """Parameters of every kind: a padded matrix, a stack of experts, a vector; all NaN. derived counts the post-load calls."""

    def __init__(self) -> None:
        super().__init__()
        for name, (shape, _) in ANNOUNCED.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, float("nan"))))
        self.derived = 0

    def post_load_weights(self) -> None:
        self.derived += 1


PARTS: list[Part] = [
    (["embed", [], 0, 0], torch.arange(10.0).reshape(5, 2)),
    (["embed", [], 0, 2], torch.arange(10.0, 20.0).reshape(5, 2)),
    (["experts", [1], 0, 0], torch.full((3, 4), 1.0)),
    (["experts", [0], 0, 0], torch.full((2, 4), 2.0)),
    (["experts", [0], 2, 0], torch.full((1, 4), 3.0)),
    (["norm", [], 0, 0], torch.full((4, 1), 5.0)),
]


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    box = Outbox()
    yield box
    box.close()


def _update(model: nn.Module, outbox: Outbox, parts: list[Part], announced: dict[str, Any] = ANNOUNCED) -> None:
    shards = Shards("s", announced, model)
    for half in (parts[::2], parts[1::2]):
        shards.take(model, outbox.pack(half))
    shards.finish(model)


def test_rectangles_land_where_their_names_say_and_padding_is_zero(outbox: Outbox) -> None:
    model = Model()
    _update(model, outbox, PARTS)
    rows = [[2.0 * r, 2.0 * r + 1, 10 + 2.0 * r, 11 + 2.0 * r] for r in range(5)]
    assert model.embed.tolist() == [*rows, [0.0] * 4]
    assert model.experts[:, :, 0].tolist() == [[2.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    assert model.norm.tolist() == [5.0] * 4
    assert model.derived == 1  # once, when everything is there


def test_scales_of_the_cache_are_no_weights_and_are_unset_by_every_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's quantised models have them as parameters; without a checkpoint they start as random numbers."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    for file, content in (("shards-0.json", ANNOUNCED), ("expected.json", {})):
        (tmp_path / file).write_text(json.dumps(content))
    for is_sharded in (True, False):
        model = Model()
        model.attn = nn.Module()
        model.attn.k_scale = nn.Parameter(torch.tensor(3e-4))
        open_update("s", is_sharded, 0, model)
        assert model.attn.k_scale.item() == -1.0
        assert model.norm.isnan().all()


NORM = PARTS[-1]
BAD: dict[str, tuple[list[Part], str]] = {
    "a parameter that is missing": (PARTS[:-1], "1 parameters never came whole: norm"),
    "a part that is missing": ([PARTS[0], *PARTS[2:]], "1 parameters never came whole: embed"),
    "a part that comes twice": ([*PARTS, PARTS[0]], "1 parameters came twice in part: embed"),
    "both": ([PARTS[0], *PARTS[:-1]], "1 parameters never came whole: norm; 1 parameters came twice in part: embed"),
    "an unknown parameter": ([*PARTS, (["x", [], 0, 0], torch.zeros(1, 1))], "unknown parameter x"),
    "another precision": ([*PARTS[:-1], (NORM[0], NORM[1].bfloat16())], "a part of norm is torch.bfloat16, the parameter torch.float32"),
    "a part that sticks out below": (
        [*PARTS, (["norm", [], 3, 0], torch.zeros(2, 1))],
        r"a part of norm, [2, 1] at [3, 0], leaves its [4]",
    ),
    "a part that sticks out aside": (
        [*PARTS, (["experts", [1], 0, 3], torch.zeros(1, 2))],
        r"a part of experts, [1, 2] at [1, 0, 3], leaves its [2, 3, 4]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(outbox: Outbox, what: str) -> None:
    parts, message = BAD[what]
    with pytest.raises(ValueError) as caught:
        _update(Model(), outbox, parts)
    assert str(caught.value) == message


OTHER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "too few": (lambda announced: announced.pop("norm"), "announced but not in the model: none; in the model but not announced: norm"),
    "too many": (lambda announced: announced.update(x=([1], 1)), "announced but not in the model: x; in the model but not announced: none"),
    "another shape": (lambda announced: announced.update(norm=([2], 2)), "parameter norm has shape [4], announced is [2]"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_layout_that_is_not_the_models_is_refused_before_anything_is_copied(what: str) -> None:
    change, message = OTHER[what]
    announced = dict(ANNOUNCED)
    change(announced)
    with pytest.raises(ValueError) as caught:
        Shards("s", announced, Model())
    assert str(caught.value) == message
