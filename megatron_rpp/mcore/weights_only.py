"""The weights of a checkpoint into a running model, in any layout: of one that a tool made, or of one that a run saved.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S
from megatron_rpp.dist.groups import Groups
from megatron_rpp.hf.model import HfModel
from megatron_rpp.mcore.checkpoint import check_files, chunk_names, reading
from megatron_rpp.mcore.weights_header import check_model


def load_weights(
    directory: Path, hf: HfModel, chunks: Sequence[GPTModel], groups: Groups, *, deadline_s: float = DEFAULT_DEADLINE_S
) -> None:
    """Overwrite the weights, cast to the model's dtype; optimizer state and random states stay. Collective.

    The optimizer's own copies must be told afterwards (`Policy.weights_changed`).
    Raises: CheckpointError, on every rank, when the directory is missing, incomplete, damaged, or of another model;
    DeadlineError when a peer does not come in deadline_s.
    """
    check_files(directory, groups, deadline_s)
    with reading(directory):
        header = dist_checkpointing.load_common_state_dict(str(directory)).get("header")
    check_model(header, hf, where=str(directory))
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    names = chunk_names(chunks)
    with reading(directory):
        state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}
        state = dist_checkpointing.load(state, str(directory))
        for name, chunk in zip(names, chunks, strict=True):
            chunk.load_state_dict(state[name], strict=True)
