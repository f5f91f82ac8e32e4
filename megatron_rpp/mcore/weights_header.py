"""What a checkpoint of weights alone says of its model. Pure: tools write it without megatron."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_rpp.errors import CheckpointError
from megatron_rpp.hf.model import HfModel

WEIGHTS_FORMAT = "weights 1"


def weights_header(hf: HfModel) -> dict[str, Any]:
    """The entry "header" of common.pt. A checkpoint with optimizer state has one of another format, with the same "model"."""
    return {"format": WEIGHTS_FORMAT, "model": asdict(hf)}


def check_model(header: dict[str, Any] | None, hf: HfModel, *, where: str) -> None:
    """Raises CheckpointError naming the entries in which a checkpoint's model and a config.json differ.

    header: of either kind of checkpoint; None for one that another program wrote and that says nothing.
    """
    said, wanted = (header or {}).get("model"), asdict(hf)
    if said is None:
        return
    if not isinstance(said, dict):
        raise CheckpointError("the checkpoint does not say of which model it is", where=where, expected="a dict", got=type(said).__name__)
    names = [name for name in wanted if said.get(name) != wanted[name]]
    if names:
        raise CheckpointError(
            "the checkpoint is of another model than config.json",
            where=where,
            expected={name: wanted[name] for name in names},
            got={name: said.get(name) for name in names},
            fix="give the config.json of the model that was saved",
        )
