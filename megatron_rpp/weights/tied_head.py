"""A tied model whose files hold a head as well: it must equal the embedding.

A tied Megatron model and SGLang have one tensor for both, so neither can run a head of its own. transformers 5.12.1 keeps such a
head and warns. To drop it here without a word would train and sample another model. A critic is not concerned: its directory
gives it the backbone alone, and any head is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8_checkpoint import wide_config
from megatron_rpp.weights.hf_io import HFCheckpoint, open_hf
from megatron_rpp.weights.raw_file import BLOCK_BYTES, row_blocks
from megatron_rpp.weights.rect import Rect

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FIX = 'to keep the head, set "tie_word_embeddings": false in config.json; to drop it, remove lm_head.weight from the file'


def check_directory(folder: Path) -> None:
    """`check_tied_head` on the HF directory `folder`. Raises: CheckpointError, ConfigError."""
    with open_hf(folder) as checkpoint:
        check_tied_head(checkpoint, describe(wide_config(checkpoint.config)))  # head and embedding are never quantized


def check_tied_head(checkpoint: HFCheckpoint, model: Model) -> None:
    """Check that a tied model has no head of its own. Reads nothing unless the directory holds one; stops at the first difference.

    Raises: CheckpointError naming both tensors and the first element that differs.
    """
    if not has_spare_head(checkpoint.entries, model) or EMBEDDING not in checkpoint.entries:
        return
    head, embedding = checkpoint.entries[HEAD], checkpoint.entries[EMBEDDING]
    where = str(head.file)
    what = f"{HEAD} differs from {EMBEDDING}, but config.json ties the two"
    if head.shape != embedding.shape:
        raise CheckpointError(what, where=where, expected=f"the shape {embedding.shape}", got=head.shape, fix=_FIX)
    itemsize = max(head.dtype.itemsize, embedding.dtype.itemsize)
    for block in row_blocks(HEAD, head.shape, itemsize, limit=BLOCK_BYTES):
        at_embedding = Rect(EMBEDDING, block.row, block.col, block.rows, block.cols)
        found = _first_difference(checkpoint.read(block), checkpoint.read(at_embedding))
        if found is not None:
            row, col, of_head, of_embedding = found
            at = f"row {block.row + row}, column {col}"
            raise CheckpointError(what, where=where, expected=f"{of_embedding} at {at}, as in {EMBEDDING}", got=of_head, fix=_FIX)


def has_spare_head(entries: Mapping[str, object], model: Model) -> bool:
    """Whether tensors of these names hold a head that the model does not read, because it is tied."""
    return model.dims.is_tied and HEAD in entries


def head_note(entries: Mapping[str, object], model: Model) -> str:
    """One sentence on what becomes of the head, for a conversion or a comparison of tensors of these names."""
    if not model.dims.is_tied:
        return f"head: {HEAD} is a tensor of its own"
    if HEAD in entries:
        return f"head: tied; {HEAD} equals {EMBEDDING} and is left out"
    return f"head: tied to {EMBEDDING}; there is no {HEAD}"


def _first_difference(left: Tensor, right: Tensor) -> tuple[int, int, float, float] | None:
    """(row, column, left, right) of the first element whose value differs; exact also for different dtypes."""
    if left.dtype != right.dtype:
        left, right = left.to(torch.float64), right.to(torch.float64)
    unequal = left != right
    if not unequal.any():
        return None
    row, col = divmod(int(unequal.flatten().to(torch.uint8).argmax()), left.shape[1])
    return row, col, left[row, col].item(), right[row, col].item()
