"""The weights of a checkpoint into a running model, in any layout: of one that a tool made, or of one that a run saved.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S
from megatron_rpp.dist.groups import Groups
from megatron_rpp.hf.model import HfModel
from megatron_rpp.mcore.checkpoint import chunk_names, open_checkpoint, reading, together
from megatron_rpp.mcore.sharded_load import load_sharded
from megatron_rpp.mcore.weights_header import check_model
from megatron_rpp.torch_dist.listing import header_of


def load_weights(
    directory: Path, hf: HfModel, chunks: Sequence[GPTModel], groups: Groups, *, deadline_s: float = DEFAULT_DEADLINE_S
) -> None:
    """Overwrite the weights, cast to the model's dtype; optimizer state and random states stay. Collective.

    The optimizer's own copies must be told afterwards (`Policy.weights_changed`).
    Raises: CheckpointError, on every rank, when the directory is missing, incomplete, damaged, or of another model;
    DeadlineError when a peer does not come in deadline_s.
    """
    listing, common = open_checkpoint(directory, groups, deadline_s)
    check_model(header_of(common, directory), hf, where=str(directory))
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    names = chunk_names(chunks)

    def read() -> None:
        with reading(directory):
            state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}
            found = load_sharded(state, listing, {})
        with reading(directory, RuntimeError):
            for name, chunk in zip(names, chunks, strict=True):
                chunk.load_state_dict(found[name], strict=True)

    together(read, "read the checkpoint", groups, deadline_s)
