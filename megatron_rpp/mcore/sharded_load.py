"""A sharded state dict from a checkpoint's files, without torch's and Megatron's readers, which unpickle.

Megatron's `dist_checkpointing.load` takes both strategies from here: the common part is already in memory,
and tensors and objects come through `torch_dist`, which builds data only. Imports megatron: import it only
after `init.start`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, LoadShardedStrategy
from torch import Tensor

from megatron_rpp.errors import CheckpointError
from megatron_rpp.torch_dist.blob import Blob
from megatron_rpp.torch_dist.listing import Chunk, Listing, Stored
from megatron_rpp.torch_dist.pickles import FETCH

# Transformer Engine keeps the scales of FP8 training as bytes that it unpickles itself. A module keeps its
# own instead.
_PICKLED_BY_OTHERS = "_extra_state"


def load_sharded(state: dict[str, Any], listing: Listing, common: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its shards read, in place where they have memory, and with `common`. Collective.

    Raises: CheckpointError on the ranks that meet it, before a tensor is overwritten when a key, a shape or
    an object is to blame.
    """
    with _Files() as files:
        return dist_checkpointing.load(state, str(listing.folder), _Sharded(listing, files), _CommonPart(common))


class _Files:
    """The file that was read last stays open."""

    def __init__(self) -> None:
        self._open: tuple[Path, BinaryIO] | None = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def stream(self, file: Path) -> BinaryIO:
        """Raises: OSError."""
        if self._open is None or self._open[0] != file:
            self.__exit__()
            self._open = (file, file.open("rb"))
        return self._open[1]


class _AnyVersion:
    """`read_listing` has compared backend and version."""

    can_handle_sharded_objects = True

    def check_backend_compatibility(self, loaded_backend: object) -> None:
        """Accepts all."""

    def check_version_compatibility(self, loaded_version: object) -> None:
        """Accepts all."""


class _CommonPart(_AnyVersion, LoadCommonStrategy):
    """The part of a checkpoint that belongs to no rank, read before."""

    def __init__(self, common: Mapping[str, Any]) -> None:
        self.common = dict(common)

    def load_common(self, checkpoint_dir: object) -> dict[str, Any]:
        return self.common

    def load_sharded_objects(self, sharded_objects_state_dict: object, checkpoint_dir: object) -> Any:
        raise TypeError("the sharded strategy loads objects")


class _Sharded(_AnyVersion, LoadShardedStrategy):
    """Tensors and objects of the .distcp files."""

    def __init__(self, listing: Listing, files: _Files) -> None:
        self.listing, self.files = listing, files

    def load_tensors_metadata(self, checkpoint_dir: object) -> Any:
        raise TypeError("the list of tensors has been read before")

    def load(self, sharded_state_dict: Any, checkpoint_dir: object) -> Any:
        wanted = list(nested_values(sharded_state_dict))
        stored = {id(one): self._stored(one) for one in wanted if isinstance(one, ShardedTensor)}
        objects = self._objects([one for one in wanted if isinstance(one, ShardedObject)])
        with self._reading():
            return dict_list_map_outplace(
                lambda one: self._filled(one, stored[id(one)]) if isinstance(one, ShardedTensor) else objects[id(one)], sharded_state_dict
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError("the file system refused a read", where=str(self.listing.folder), got=error) from error

    def _stored(self, wanted: ShardedTensor) -> Stored:
        """Raises: CheckpointError when the checkpoint holds no such tensor."""
        stored = self.listing.tensors.get(wanted.key)
        if stored is None:
            raise CheckpointError(f"{wanted.key} is missing", where=str(self.listing.folder), expected=f"a tensor {wanted.global_shape}")
        is_same = len(stored.shape) == len(wanted.global_shape) if wanted.allow_shape_mismatch else stored.shape == wanted.global_shape
        if not is_same:
            what = f"{wanted.key} has another shape"
            raise CheckpointError(what, where=str(self.listing.folder), expected=tuple(wanted.global_shape), got=stored.shape)
        if stored.dtype.is_floating_point != wanted.dtype.is_floating_point:
            what = f"{wanted.key} has another kind of elements"
            raise CheckpointError(what, where=str(self.listing.folder), expected=wanted.dtype, got=stored.dtype)
        return stored

    def _objects(self, wanted: list[ShardedObject]) -> dict[int, Any]:
        """The value for each object that is asked for, by its identity."""
        found: dict[int, Any] = {}
        seen: Counter[str] = Counter()
        for one in wanted:
            span = self.listing.objects.get(one.unique_key)
            if span is None:
                raise CheckpointError(f"{one.unique_key} is missing", where=str(self.listing.folder), expected="an object")
            with self._reading():
                values = Blob(self.files.stream(span.file), span, one.unique_key).value()
            number = seen[one.unique_key]  # objects of one key are saved as one list
            if not isinstance(values, list) or number >= len(values):
                expected = f"a list of at least {number + 1}"
                raise CheckpointError(f"{one.unique_key} is not an object", where=str(span.file), expected=expected, fix=FETCH)
            found[id(one)] = one.data if one.key.endswith(_PICKLED_BY_OTHERS) else values[number]
            seen[one.unique_key] += 1
        return found

    def _filled(self, wanted: ShardedTensor, stored: Stored) -> Tensor:
        """The local tensor with what the checkpoint holds of it; zero elsewhere, which is padding."""
        if wanted.data is None:
            wanted.init_data("cpu")
        local = wanted.data.detach()
        if wanted.allow_shape_mismatch:
            local.zero_()
        target = local[(None,) * wanted.prepend_axis_num]
        for chunk in stored.chunks:
            here, there = _common_box(tuple(wanted.global_offset), tuple(target.shape), chunk)
            if all(one.start < one.stop for one in here):
                target[here].copy_(self._chunk(chunk, stored, wanted.key)[there])
        return local

    def _chunk(self, chunk: Chunk, stored: Stored, key: str) -> Tensor:
        blob = Blob(self.files.stream(chunk.file), chunk.span, f"{key} {list(chunk.offsets)}")
        piece = blob.tensor()
        if (piece.dtype, piece.shape) != (stored.dtype, chunk.sizes):
            expected, got = f"{stored.dtype} {chunk.sizes}", f"{piece.dtype} {piece.shape}"
            raise CheckpointError(f"{blob.what} is another tensor", where=str(chunk.file), expected=expected, got=got, fix=FETCH)
        return blob.read(piece)


def _common_box(offset: tuple[int, ...], shape: torch.Size | tuple[int, ...], chunk: Chunk) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a local tensor and a chunk share, in the coordinates of each. Empty slices: nothing."""
    here, there = [], []
    for mine, num_mine, theirs, num_theirs in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True):
        first, last = max(mine, theirs), min(mine + num_mine, theirs + num_theirs)
        here.append(slice(first - mine, max(last, first) - mine))
        there.append(slice(first - theirs, max(last, first) - theirs))
    return tuple(here), tuple(there)
