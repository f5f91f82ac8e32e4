"""Model, optimizer, schedule and random states to and from a directory, in Megatron's torch_dist format.

The format knows global tensors, not ranks: a checkpoint of one layout of tp, pp, vpp, cp, ep, etp and dp loads into another. On
the same layout a run continues bit for bit. Imports megatron: import it only after `init.start`.

    <directory>/metadata.json .metadata common.pt __<rank>_<n>.distcp     Megatron's
    <directory>/files.json                         name -> bytes and CRC-32 of each of those, written last, checked before a load
"""

from __future__ import annotations

import json
import pickle
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S, barrier, broadcast_object, gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import CheckpointError, StorageError
from megatron_rpp.files import describe_space, storage_error, write_whole, writing
from megatron_rpp.hf.model import HfModel
from megatron_rpp.mcore.optimizer import Optimizer

FORMAT = 2
MANIFEST = "files.json"

Fingerprint = dict[str, int]

# What reading a directory of another kind raises, in megatron, torch and below. Damage is found before, by checksum; and a
# RuntimeError is mostly a peer that left, which is not the checkpoint's fault.
_BROKEN = (CheckpointingException, CheckpointException, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


def save(
    directory: Path,
    hf: HfModel,
    chunks: Sequence[GPTModel],
    optimizer: Optimizer,
    groups: Groups,
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> None:
    """Write everything that training needs to continue. Collective; returns when all files of all ranks are written.

    directory: on a file system that all ranks see; empty or absent. Give it a temporary name and rename it afterwards.
    deadline_s: longest wait for a peer. Raises: DeadlineError; StorageError when a file cannot be written.
    """
    if groups.rank == 0:
        with writing(directory):
            directory.mkdir(exist_ok=True)
    barrier(groups.world_cpu, name="checkpoint directory", deadline_s=deadline_s)
    state = _sharded_state(chunks, optimizer, groups, is_loading=False)
    state["rng"] = _sharded_rng(groups)
    state["header"] = _header(hf, chunks, optimizer, groups)
    strategy = get_default_save_sharded_strategy()
    if groups.dp_size * groups.cp_size > 1:
        # replicas share the writing, where each by itself would leave all of it to the first
        strategy = FullyParallelSaveStrategyWrapper(strategy, groups.dp_cp)
    with _writing_all(directory):
        dist_checkpointing.save(state, str(directory), strategy)
    barrier(groups.world_cpu, name="checkpoint files", deadline_s=deadline_s)
    names = sorted(path.name for path in directory.iterdir())
    fingerprints: dict[str, Fingerprint] = {}
    mine = {name: _fingerprint(directory / name) for name in _mine(names, groups)}
    for share in gather_objects(mine, groups.world_cpu, name="checkpoint checksums", deadline_s=deadline_s):
        fingerprints |= share
    if groups.rank == 0:
        write_whole(directory / MANIFEST, json.dumps(fingerprints, indent=1, sort_keys=True) + "\n")
    barrier(groups.world_cpu, name="checkpoint manifest", deadline_s=deadline_s)


@contextmanager
def _writing_all(directory: Path) -> Iterator[None]:
    """What Megatron and torch raise when they cannot write a checkpoint becomes a StorageError, on every rank."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from error
    except (CheckpointException, CheckpointingException) as error:
        failures = getattr(error, "failures", {})  # rank -> (exception, its stack); torch's writer loses the errno
        reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in sorted(failures.items())]
        raise StorageError(
            "the checkpoint cannot be written",
            where=str(directory),
            got="; ".join([*reasons, describe_space(directory)]),
            fix="make sure that there is space for one more checkpoint, then start the run again: it resumes from its newest one",
        ) from error


def load(
    directory: Path,
    hf: HfModel,
    chunks: Sequence[GPTModel],
    optimizer: Optimizer,
    groups: Groups,
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> None:
    """Read what `save` wrote, in this or another layout of the same model. Collective.

    The random states are restored only on the layout that saved them: they belong to ranks, not to the model.
    Raises: CheckpointError, on every rank, when the directory is missing, incomplete, damaged, or of another model or precision;
    DeadlineError when a peer does not come in deadline_s.
    """
    check_files(directory, groups, deadline_s)
    with reading(directory):
        header = dist_checkpointing.load_common_state_dict(str(directory))["header"]
    wanted = _header(hf, chunks, optimizer, groups)
    _check_header(header, wanted, directory)
    is_same_layout = header["layout"] == wanted["layout"]
    with reading(directory):
        state = _sharded_state(chunks, optimizer, groups, is_loading=True)
        if is_same_layout:
            state["rng"] = _sharded_rng(groups)
        state = dist_checkpointing.load(state, str(directory))
        for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
            chunk.load_state_dict(state[name], strict=True)
        optimizer.inner.load_state_dict(state["optimizer"])
        optimizer.scheduler.load_state_dict(state["scheduler"])
        if is_same_layout:
            _restore_rng(state["rng"])


def _sharded_state(chunks: Sequence[GPTModel], optimizer: Optimizer, groups: Groups, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }
    model = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(chunk_names(chunks), chunks, strict=True)}
    return {
        **model,
        "optimizer": optimizer.sharded_state(model, metadata, is_loading=is_loading),
        "scheduler": optimizer.scheduler.state_dict(),
    }


def chunk_names(chunks: Sequence[GPTModel]) -> list[str]:
    """The names under which Megatron's own optimizer looks for the chunks."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _header(hf: HfModel, chunks: Sequence[GPTModel], optimizer: Optimizer, groups: Groups) -> dict[str, Any]:
    """What must agree between the run that saved and the run that loads, and the layout, which need not. Plain values."""
    return {
        "format": FORMAT,
        "model": asdict(hf),
        "dtype": str(chunks[0].config.params_dtype),
        "is_optimizer_distributed": optimizer.is_distributed,
        "layout": {
            "tp": groups.tp_size,
            "cp": groups.cp_size,
            "dp": groups.dp_size,
            "pp": groups.pp_size,
            "vpp": len(chunks),
            "ep": groups.ep_size,
            "etp": groups.etp_size,
        },
    }


def _check_header(got: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    advice = {
        "format": "use the version of megatron_rpp that wrote it",
        "model": "point model.hf at the model that this run was started from",
        "dtype": "set model.dtype as it was",
        "is_optimizer_distributed": "set optim.distributed as it was",
    }
    for name, fix in advice.items():
        if got.get(name) != wanted[name]:
            expected, found = _differences(wanted[name], got.get(name))
            raise CheckpointError(f"the checkpoint's {name} is another", where=str(directory), expected=expected, got=found, fix=fix)


def _differences(wanted: Any, got: Any) -> tuple[Any, Any]:
    """Of two dicts only the entries that differ."""
    if not (isinstance(wanted, dict) and isinstance(got, dict)):
        return wanted, got
    names = [name for name in wanted if got.get(name) != wanted[name]]
    return {name: wanted[name] for name in names}, {name: got.get(name) for name in names}


def check_files(directory: Path, groups: Groups, deadline_s: float) -> None:
    """Compare every file with the list, so that damage is found before anything is overwritten: Megatron checks no checksums.

    Each rank reads a share of the files. Raises: CheckpointError, the same on every rank.
    """
    manifest = _read_manifest(directory) if groups.rank == 0 else None
    manifest = broadcast_object(manifest, groups.world_cpu, name="checkpoint manifest", deadline_s=deadline_s)
    errors: list[str | None] = [manifest] if isinstance(manifest, str) else []
    if not errors:
        mine = [_damage(directory / name, manifest[name]) for name in _mine(sorted(manifest), groups)]
        errors = gather_objects(next(filter(None, mine), None), groups.world_cpu, name="checkpoint files", deadline_s=deadline_s)
    for error in filter(None, errors):
        raise CheckpointError(error, where=str(directory), fix="continue from an older one")


def _read_manifest(directory: Path) -> dict[str, Fingerprint] | str:
    """The list of files, or what is wrong."""
    if not directory.is_dir():
        return "there is no such checkpoint"
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"the checkpoint is incomplete: its list of files, {MANIFEST}, is missing or unreadable"


def _damage(path: Path, recorded: Fingerprint) -> str | None:
    """What distinguishes a file from what was written, None when nothing does."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != recorded["bytes"]:
        return f"{path.name} is damaged: {path.stat().st_size} bytes where {recorded['bytes']} were written"
    return None if _fingerprint(path) == recorded else f"{path.name} is damaged: its checksum is not that of what was written"


def _fingerprint(path: Path) -> Fingerprint:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _mine(names: Sequence[str], groups: Groups) -> Sequence[str]:
    return names[groups.rank :: groups.size]


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """What Megatron, torch and pickle raise over a damaged checkpoint becomes a CheckpointError that names it."""
    try:
        yield
    except _BROKEN as error:
        raise CheckpointError(
            "the checkpoint cannot be read", where=str(directory), got=f"{type(error).__name__}: {error}", fix="continue from an older one"
        ) from error


def _sharded_rng(groups: Groups) -> ShardedObject:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", state, (groups.size,), (groups.rank,), replica_id=0)


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
