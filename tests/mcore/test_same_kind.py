"""An entry of another type is found before an optimizer takes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_rpp.mcore.same_kind import check_like

GROUP = {"lr": 1e-3, "betas": (0.9, 0.98), "foreach": None, "amsgrad": False, "step": 1.0, "params": [0, 1]}
MINE = {
    "optimizer": {"param_groups": [GROUP, {**GROUP, "lr": 0.0}], "state": {"common_step": torch.tensor(0.0), "shards": object()}},
    "param_state_sharding_type": "fully_reshardable",
    "num_steps": 3,
}


def changed(change: Callable[[Any], object]) -> dict[str, Any]:
    theirs = copy.deepcopy(MINE)
    change(theirs)
    return theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda state: None,
        lambda state: state.update(num_steps=7, x="another version's"),
        lambda state: state.pop("num_steps"),
        lambda state: state["optimizer"]["state"].update(shards=None, common_step=torch.tensor(4.0)),
        lambda state: state["optimizer"]["param_groups"].pop(),
        lambda state: state["optimizer"]["param_groups"][0].update(lr=1, foreach=True, x=3),
        lambda state: [state["optimizer"]["param_groups"][0].pop(name) for name in ("step", "foreach", "amsgrad")],
        lambda state: state["optimizer"]["param_groups"][0].update(params=[]),
    ],
)
def test_the_state_of_another_step_or_layout_is_of_the_same_kind(change: Callable[[Any], object]) -> None:
    check_like(MINE, changed(change), "it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update(num_steps="3"), r"it\.num_steps is of type str, not int"),
        (lambda state: state.update(num_steps=True), r"it\.num_steps is of type bool"),
        (lambda state: state.update(optimizer=[]), r"it\.optimizer is of type list, not dict"),
        (lambda state: state["optimizer"].update(param_groups={}), r"param_groups is of type dict, not a list"),
        (lambda state: state["optimizer"].update(param_groups=[3]), r"param_groups\[0\] is of type int, not dict"),
        (lambda state: state["optimizer"]["param_groups"][1].update(lr=None), r"param_groups\[1\]\.lr is of type NoneType"),
        (lambda state: state["optimizer"]["param_groups"][1].update(betas=(0.9, "x")), r"betas\[1\] is of type str"),
        (lambda state: state["optimizer"]["param_groups"][1].update(betas=()), r"betas is of type tuple, not a list"),
        (lambda state: state["optimizer"]["param_groups"][1].pop("betas"), r"param_groups\[1\] has no betas"),
        (lambda state: state["optimizer"]["param_groups"][1].update(foreach=[]), r"foreach is of type list"),
        (lambda state: state["optimizer"]["state"].update(common_step=torch.zeros(3)), r"common_step is of type Tensor"),
    ],
)
def test_an_entry_of_another_type_is_named(change: Callable[[Any], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_like(MINE, changed(change), "it")
