"""`rpp` with a broken weight sync: the keys and values of one layer change places on their way to the engine, on either path."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from megatron_rpp import __main__, delivery
from megatron_rpp.rollout.memory import Bucket
from megatron_rpp.weights.buckets import Transfer
from megatron_rpp.weights.gather import iter_hf_tensors

KEYS, VALUES = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
real_labelled = delivery.labelled


def swapping_tensors(*args: object, **kwargs: object) -> Iterator[dict[str, Tensor]]:
    for bucket in iter_hf_tensors(*args, **kwargs):
        if KEYS in bucket and VALUES in bucket:
            bucket[KEYS], bucket[VALUES] = bucket[VALUES], bucket[KEYS]
        yield bucket


def swapping_parts(parts: Sequence[tuple[Transfer, Tensor]]) -> Bucket:
    """A key goes to where the value of the same rows belongs, and the other way round: values lie below the keys."""
    rows = {name: next((t.dst_piece for t, _ in parts if t.rect.hf == name), None) for name in (KEYS, VALUES)}
    moved = []
    for transfer, values in parts:
        other = {KEYS: VALUES, VALUES: KEYS}.get(transfer.rect.hf)
        if other is not None:
            transfer = replace(transfer, dst_piece=replace(transfer.dst_piece, row=rows[other].row))
        moved.append((transfer, values))
    return real_labelled(moved)


if __name__ == "__main__":
    delivery.iter_hf_tensors = swapping_tensors
    delivery.labelled = swapping_parts
    sys.exit(__main__.main())
