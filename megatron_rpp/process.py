"""What every command that uses Megatron opens first: process groups, the run directory, the log; and the policy on top."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import megatron_rpp_patches
from megatron_rpp.config.load import dump, load
from megatron_rpp.config.schema import Config
from megatron_rpp.dist import leaving
from megatron_rpp.dist.activity import doing
from megatron_rpp.dist.agreement import raise_together
from megatron_rpp.dist.collectives import barrier, broadcast_object, gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.dist.heartbeat import watching_peers
from megatron_rpp.dist.world import World
from megatron_rpp.errors import CheckpointError, ConfigError, DeadlineError, PatchError, RppError
from megatron_rpp.files import storage_error
from megatron_rpp.mcore import init
from megatron_rpp.mcore.critic import Critic
from megatron_rpp.mcore.model import MegatronModel
from megatron_rpp.mcore.policy import Policy
from megatron_rpp.observe.log import RunLog
from megatron_rpp.observe.rundir import RunDir, versions
from megatron_rpp.resume import changed_settings, complete_steps, read_state, settings_digest, step_dir, stray_entries
from megatron_rpp.torch_dist.listing import read_common, read_listing
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.hf_io import has_weights, open_hf, read_json
from megatron_rpp.weights.live import LiveWeights, live_weights
from megatron_rpp.weights.load import fill
from megatron_rpp.weights.tied_head import check_directory


@dataclass(frozen=True, slots=True)
class Process:
    """One rank of an open run. resumed_step: the checkpoint that the run goes on from, 0 for none."""

    cfg: Config
    world: World
    groups: Groups
    dir: RunDir
    log: RunLog
    resumed_step: int

    @property
    def is_first(self) -> bool:
        return self.groups.rank == 0

    @property
    def device(self) -> torch.device:
        return init.device_of(self.cfg, self.world)

    @property
    def deadline_s(self) -> float:
        return self.cfg.run.deadline_s

    @property
    def digest(self) -> str:
        """Of the settings that the numbers depend on."""
        return settings_digest(asdict(self.cfg))

    def together(self, what: str, call: Callable[[], None], *, here: bool, longest_s: float = 0.0) -> None:
        """Run `call` where `here` is True while the other ranks wait; what goes wrong on one rank is raised on all.

        Units: longest_s, the deadline that `call` itself keeps, in seconds.
        """
        error: RppError | None = None
        if here:
            try:
                with doing(what):
                    call()
            except RppError as raised:
                error = raised
            except OSError as raised:
                error = storage_error(raised)
        raise_together(error, groups=self.groups, what=what, deadline_s=longest_s + self.deadline_s)


@contextmanager
def open_process(cfg: Config, command: Literal["train", "sft", "eval"]) -> Iterator[Process]:
    """Join the run. Leaves the process groups closed and the run directory free, also after an error.

    command: `rpp train` has run.dir and goes on from its checkpoint where run.resume says so. The others start anew each time, each
    in a folder of its own in run.dir, so that they leave the records of a training run with the same settings alone.
    Raises: RppError, on every rank when it happens on one; CheckpointError when the checkpoint belongs to another experiment, before
    anything is written.
    """
    with ExitStack() as stack:
        world = World.from_env()
        with doing("join the run"):
            groups = init.start(cfg, world)
        stack.push(_close_groups)
        stack.enter_context(watching_peers(groups.rank, groups.size, deadline_s=cfg.run.deadline_s))
        directory = RunDir(cfg.run.dir if command == "train" else cfg.run.dir / f"rpp-{command}")
        error, step = None, 0
        if groups.rank == 0:
            try:
                directory = stack.enter_context(RunDir.open(directory.path))
                step = step_to_resume(cfg, directory) if command == "train" else 0
                _check_checkpoints(cfg, directory, command, step)
            except RppError as raised:
                error = raised
        raise_together(error, groups=groups, what="open the run directory", deadline_s=cfg.run.deadline_s)
        step = broadcast_object(step, groups.world_cpu, name="step to go on from", deadline_s=cfg.run.deadline_s)
        # A run that starts anew keeps no record of what was in its directory before, not even of step 0.
        log = stack.enter_context(RunLog(cfg.observe, directory if groups.rank == 0 else None, resumed_step=step or -1))
        process = Process(cfg, world, groups, directory, log, step)
        if process.is_first and command == "train":
            _warn_of_strays(process)
        process.together("write the run's settings", lambda: _write_settings(process), here=process.is_first)
        record_patches(process)
        process.together("compare tied heads with embeddings", lambda: _check_tied_heads(cfg, command), here=process.is_first)
        yield process
        barrier(groups.world_cpu, name="the end of the run", deadline_s=cfg.run.deadline_s)
        leaving.finish()


def _close_groups(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    """Not after a wait that failed, or an error that the peers do not share: closing a group waits for peers, as long as it takes."""
    if kind is None or (isinstance(error, RppError) and not isinstance(error, DeadlineError)):
        init.stop()


def _check_checkpoints(cfg: Config, directory: RunDir, command: Literal["train", "sft", "eval"], step: int) -> None:
    """Read the lists of what will be loaded, before an engine starts and before anything is written. Raises: CheckpointError."""
    folders = []
    if cfg.model.megatron_checkpoint is not None and command != "eval":
        folders.append(cfg.model.megatron_checkpoint)
    if step > 0:
        saved = step_dir(directory.checkpoints, step)
        folders += [saved / "policy", *([saved / "critic"] if cfg.algo.estimator == "gae" else [])]
    for folder in folders:
        read_listing(folder)
        read_common(folder)


def _warn_of_strays(process: Process) -> None:
    strays = stray_entries(process.dir.checkpoints)
    if strays:
        process.log.warn(
            f"{process.dir.checkpoints} holds {', '.join(strays)}: no checkpoint of this run has such a name; "
            "the run ignores it (step-000010 would be one)"
        )


def _check_tied_heads(cfg: Config, command: Literal["train", "sft", "eval"]) -> None:
    """Before an engine starts, by one rank for all: the tensors of a large model are too big for each rank to read them.
    A critic takes no head from critic.hf.

    Raises: CheckpointError, ConfigError.
    """
    read = set() if cfg.model.megatron_checkpoint is not None else {cfg.model.hf}
    if command == "train" and cfg.model.ref is not None:
        read.add(cfg.model.ref)
    for hf in sorted(read):
        if command != "eval" or has_weights(hf):  # an engine reads other formats as well
            check_directory(hf)


def step_to_resume(cfg: Config, directory: RunDir) -> int:
    """Finished steps of the newest checkpoint; 0 where a run starts anew. Raises: CheckpointError."""
    steps = complete_steps(directory.checkpoints)
    if cfg.run.resume == "must" and not steps:
        raise CheckpointError(
            "there is no complete checkpoint to go on from",
            where=str(directory.checkpoints),
            fix="set run.resume: auto to start anew, or run.dir to the directory of the run",
        )
    if not steps or cfg.run.resume == "never":
        return 0
    where, digest = step_dir(directory.checkpoints, steps[-1]), settings_digest(asdict(cfg))
    saved = read_state(where).digest
    if saved != digest:
        raise CheckpointError(
            "the checkpoint belongs to a run with other settings",
            where=str(where),
            expected=f"those of {directory.config}, digest {saved}",
            got="; ".join(_changed(cfg, directory, saved)) or f"digest {digest}",
            fix="restore the settings, choose another run.dir, or set run.resume: never",
        )
    return steps[-1]


def _changed(cfg: Config, directory: RunDir, saved: str) -> list[str]:
    """Which settings are others than the checkpoint's; none where config.yaml is not of that run."""
    try:
        before = asdict(load(directory.config))
    except ConfigError:
        return []
    return changed_settings(before, asdict(cfg)) if settings_digest(before) == saved else []


def _write_settings(process: Process) -> None:
    process.dir.write_text("config.yaml", dump(process.cfg))
    process.dir.write_json("versions.json", versions())


def record_patches(process: Process, engine_reports: Sequence[dict[str, Any]] = ()) -> None:
    """Write patches.json: which patches stand in which process of the run. Collective.

    engine_reports: what this rank's engine said of its own processes.
    Raises: PatchError, on every rank, when two trainer ranks run with different patches.
    """
    mine = {"role": "trainer", "rank": process.groups.rank, "pid": os.getpid(), "patches": megatron_rpp_patches.report()}
    gathered = gather_objects((mine, list(engine_reports)), process.groups.world_cpu, name="patches", deadline_s=process.deadline_s)
    active = {trainer["rank"]: sorted(row["id"] for row in trainer["patches"] if row["active"]) for trainer, _ in gathered}
    if any(ids != active[0] for ids in active.values()):
        raise PatchError(
            "ranks run with different patches",
            where="patches",
            expected=f"those of rank 0: {active[0]}",
            got={rank: ids for rank, ids in active.items() if ids != active[0]},
            fix="install the same requirements on every host; `rpp doctor` shows what is there",
        )
    processes = [trainer for trainer, _ in gathered] + [report for _, reports in gathered for report in reports]
    process.together("write patches.json", lambda: process.dir.write_json("patches.json", processes), here=process.is_first)


def open_policy(
    process: Process, *, cfg: Config | None = None, trainable: bool = True, hf: Path | None = None, total_steps: int | None = None
) -> tuple[Policy, LiveWeights]:
    """A Megatron model with its weights, and its parameters bound to the mapping. Collective.

    Weights are those of an HF directory; of model.hf, those of model.megatron_checkpoint where one is set.
    cfg: another configuration than the process's. hf: default model.hf. total_steps: see Policy.from_config.
    Raises: ConfigError, GeometryError, CheckpointError; on every rank when it happens on one.
    """
    cfg = cfg or process.cfg
    hf = hf or cfg.model.hf
    policy = Policy.from_config(cfg, process.groups, trainable=trainable, hf_dir=hf, total_steps=total_steps)
    checkpoint = cfg.model.megatron_checkpoint if hf == cfg.model.hf else None
    return policy, _load(process, policy, describe(read_json(hf / "config.json")), hf, checkpoint=checkpoint)


def open_critic(process: Process) -> Critic:
    """The value model of critic.hf (default: model.hf), its head at 0. Collective. Raises: as `open_policy`."""
    hf = process.cfg.critic.hf or process.cfg.model.hf
    critic = Critic.from_config(process.cfg, process.groups, hf_dir=hf)
    _load(process, critic, describe(read_json(hf / "config.json")).without_head(), hf)
    return critic


def _load(process: Process, model: MegatronModel, description: Model, hf: Path, *, checkpoint: Path | None = None) -> LiveWeights:
    """Bind a model's parameters to the mapping, and fill them from an HF directory, or from a Megatron checkpoint."""
    live = live_weights(description, model.named_local(), process.groups, dtype=model.dtype, deadline_s=process.deadline_s)
    if checkpoint is not None:
        model.load_weights(checkpoint)
    else:
        process.together(f"load {hf}", lambda: fill(live, open_hf(hf)), here=True)
        model.weights_changed()
    return live
