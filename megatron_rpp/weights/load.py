"""HF directory -> running model: every rank reads its own rectangles and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_rpp.weights.hf_io import HFCheckpoint
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.rect import Local, view
from megatron_rpp.weights.tied_head import HEAD


def fill(live: LiveWeights, checkpoint: HFCheckpoint) -> None:
    """Overwrites the live parameters of this rank with the weights of an HF directory, cast to the live dtype. Not collective.

    An optimizer that keeps its own copy of the parameters must be told afterwards (Megatron: reload_model_params()).
    Raises: CheckpointError when the directory does not hold exactly the model's tensors in its shapes.
    """
    model = live.layout.model
    # The head of a tied model equals the embedding, as tied_head.check_directory made sure; a critic leaves out any.
    is_ignored = model.dims.is_tied or model.head is None
    checkpoint.check(model.hf_shapes, (*model.ignored, *((HEAD,) if is_ignored else ())))
    fill_locals(live.locals, live.tensors, checkpoint)


def fill_locals(locals_: Iterable[Local], tensors: Mapping[str, Tensor], checkpoint: HFCheckpoint) -> None:
    """The same for any list of locals and their tensors. What no HF tensor covers (padding of the vocabulary) becomes 0."""
    with torch.no_grad():
        for local in locals_:
            tensor = tensors[local.name]
            if local.has_padding:
                tensor.zero_()
            for piece in local.pieces:
                view(tensor, piece, piece.rect).copy_(checkpoint.read(piece.rect))
