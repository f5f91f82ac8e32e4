"""Running model -> HF directory, by the same plan as engine updates; rank 0 writes while the tensors stream in."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megatron_rpp.dist.collectives import broadcast_object
from megatron_rpp.errors import CheckpointError
from megatron_rpp.files import storage_error
from megatron_rpp.weights.gather import iter_hf_tensors
from megatron_rpp.weights.hf_io import SHARD_BYTES, save_hf
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.planner import BUCKET_BYTES

_WRITER = 0


def export_bytes(live: LiveWeights, dtype: torch.dtype | None = None) -> int:
    """The size of the tensors that `export_hf` writes, in bytes."""
    model, dtype = live.layout.model, dtype or live.layout.dtype
    sizes = [math.prod(shape) * model.hf_dtypes.get(name, dtype).itemsize for name, shape in model.hf_shapes.items()]
    return sum(sizes)


def export_hf(
    live: LiveWeights,
    folder: Path | str,
    *,
    source: Path | str,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    shard_bytes: int = SHARD_BYTES,
    deadline_s: float,
) -> None:
    """Writes the policy as an HF directory. Collective over the world; returns on every rank once the directory is complete.

    source: HF directory that config and tokenizer files are copied from. dtype: None keeps the live one.
    Units: deadline_s for each bucket and for the end; bucket_bytes is the most that rank 0 holds, or its largest tensor.
    Raises: CheckpointError on every rank when rank 0 could not write; DeadlineError.
    """
    dtype = dtype or live.layout.dtype
    buckets = iter_hf_tensors(live, (_WRITER,), dtype=dtype, bucket_bytes=bucket_bytes, deadline_s=deadline_s)
    failure: str | None = None
    if live.rank == _WRITER:
        stream = (item for bucket in buckets for item in bucket.items())
        try:
            save_hf(
                folder,
                stream,
                shapes=live.layout.model.hf_shapes,
                dtype=dtype,
                source=source,
                own_dtypes=live.layout.model.hf_dtypes,
                shard_bytes=shard_bytes,
            )
        except CheckpointError as error:
            failure = str(error)
        except OSError as error:
            failure = str(storage_error(error, Path(folder)))
    # The other ranks' share, and what is left of the writer's when it failed: nobody may be kept waiting.
    for _ in buckets:
        pass
    failure = broadcast_object(failure, live.groups.world_cpu, src=_WRITER, name="end of export", deadline_s=deadline_s)
    if failure is not None:
        raise CheckpointError(f"export failed: {failure}", where=str(folder))
