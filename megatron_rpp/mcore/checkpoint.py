"""Model, optimizer, schedule and random states to and from a directory, in Megatron's torch_dist format.

The format knows global tensors, not ranks: a checkpoint of one layout of tp, pp, vpp, cp, ep, etp and dp loads into another. On
the same layout a run continues bit for bit. Imports megatron: import it only after `init.start`.

    <directory>/metadata.json .metadata common.pt __<rank>_<n>.distcp     Megatron's
    <directory>/files.json                         name -> bytes and CRC-32 of each of those, written last, checked before a load
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rpp.dist.agreement import attempt, raise_together
from megatron_rpp.dist.collectives import DEFAULT_DEADLINE_S, barrier, broadcast_object, gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import CheckpointError, StorageError
from megatron_rpp.files import describe_space, storage_error, writing
from megatron_rpp.hf.model import HfModel
from megatron_rpp.mcore.optimizer import Optimizer
from megatron_rpp.mcore.random_states import random_states, restore_random_states
from megatron_rpp.mcore.same_kind import check_like
from megatron_rpp.mcore.sharded_load import load_sharded
from megatron_rpp.torch_dist.listing import COMMON, Listing, header_of, read_common, read_listing
from megatron_rpp.torch_dist.manifest import Fingerprint, check_content, fingerprint, read_manifest, write_manifest
from megatron_rpp.torch_dist.pickles import FETCH, shortened

FORMAT = 2

Result = TypeVar("Result")

# What Megatron raises over a state that is not of its kind. A RuntimeError may be a peer that left, so it counts only where no
# other rank takes part.
_WRONG = (CheckpointingException, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError)


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

    directory: on a file system that all ranks see; empty or absent, in a directory that exists. Give it a
    temporary name and rename it afterwards.
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
    mine = {name: fingerprint(directory / name) for name in _mine(names, groups)}
    for share in gather_objects(mine, groups.world_cpu, name="checkpoint checksums", deadline_s=deadline_s):
        fingerprints |= share
    if groups.rank == 0:
        write_manifest(directory, fingerprints)
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
    listing, common = open_checkpoint(directory, groups, deadline_s)
    wanted = _header(hf, chunks, optimizer, groups)
    header = header_of(common, directory) or {}
    _check_header(header, wanted, directory)
    is_same_layout = header.get("layout") == wanted["layout"]
    state = _sharded_state(chunks, optimizer, groups, is_loading=True)
    if is_same_layout:
        state["rng"] = _sharded_rng(groups)
    plain = {name: common.get(name) for name in ("optimizer", "scheduler")}

    def compare() -> None:
        with reading(directory / COMMON):
            for name, found in plain.items():
                check_like(state[name], found, name)

    def read() -> dict[str, Any]:
        with reading(directory):
            return load_sharded(state, listing, plain)

    def take(found: dict[str, Any]) -> None:
        with reading(directory, RuntimeError):
            for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
                chunk.load_state_dict(found[name], strict=True)
            optimizer.inner.load_state_dict(found["optimizer"])
            optimizer.scheduler.load_state_dict(found["scheduler"])
            if is_same_layout:
                restore_random_states(found["rng"])

    together(compare, "compare the checkpoint's state with the run's", groups, deadline_s)
    found = together(read, "read the checkpoint", groups, deadline_s)
    together(lambda: take(found), "take the checkpoint's state", groups, deadline_s)


def together(call: Callable[[], Result], what: str, groups: Groups, deadline_s: float) -> Result:
    """The result of a call that every rank makes. What goes wrong on one rank is raised on all. Collective."""
    found: list[Result] = []
    error = attempt(lambda: found.append(call()))
    raise_together(error, groups=groups, what=what, deadline_s=deadline_s)
    return found[0]


def open_checkpoint(directory: Path, groups: Groups, deadline_s: float) -> tuple[Listing, dict[str, Any]]:
    """What a checkpoint holds and where, and the part of it that belongs to no rank. Every file is compared with files.json.

    Raises: CheckpointError, on every rank, when it is missing, incomplete, damaged, or names more than data. Collective.
    """
    check_files(directory, groups, deadline_s)
    return together(lambda: (read_listing(directory), read_common(directory)), "open the checkpoint", groups, deadline_s)


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

    def listed() -> dict[str, Fingerprint] | None:
        if groups.rank != 0:
            return None
        if not directory.is_dir():
            raise CheckpointError("there is no such checkpoint", where=str(directory), fix=FETCH)
        return read_manifest(directory)

    def compare() -> None:
        with reading(directory):
            for name in _mine(sorted(manifest), groups):
                check_content(directory / name, manifest[name])

    manifest = together(listed, "read the checkpoint's list of files", groups, deadline_s)
    manifest = broadcast_object(manifest, groups.world_cpu, name="checkpoint manifest", deadline_s=deadline_s)
    together(compare, "compare the checkpoint's files with their checksums", groups, deadline_s)


def _mine(names: Sequence[str], groups: Groups) -> Sequence[str]:
    return names[groups.rank :: groups.size]


@contextmanager
def reading(where: Path, *more: type[Exception]) -> Iterator[None]:
    """What Megatron and torch raise over a state that is not of their kind becomes a CheckpointError. more: other such exceptions."""
    try:
        yield
    except (*_WRONG, *more) as error:
        got = shortened(f"{type(error).__name__}: {error}")
        raise CheckpointError("the checkpoint cannot be read", where=str(where), got=got, fix=FETCH) from error


def _sharded_rng(groups: Groups) -> ShardedObject:
    return ShardedObject("rng", random_states(), (groups.size,), (groups.rank,), replica_id=0)
