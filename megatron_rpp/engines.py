"""The engines of a run: every leader starts its own, all share one queue of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from megatron_rpp import engine_dir
from megatron_rpp.config.schema import Config
from megatron_rpp.delivery import ENGINE_SHARE, DirectPath, GatherPath, WeightPath
from megatron_rpp.dist import leaving
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import host_group
from megatron_rpp.dist.heartbeat import reported
from megatron_rpp.dist.layout import EngineGroup, engine_group, engine_groups, num_engines
from megatron_rpp.dist.store import run_store
from megatron_rpp.errors import ConfigError, RppError
from megatron_rpp.hf.model import read_model
from megatron_rpp.process import Process, record_patches
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.generate import RolloutLimits, Rollouts
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.rollout.queue import WorkQueue
from megatron_rpp.rollout.settings import EngineSettings
from megatron_rpp.weights.devices import best_devices, kept_bytes, planned_layout
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8 import Fp8Pair
from megatron_rpp.weights.hf_io import read_json
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.sglang_layout import SGLangLayout

Detokenise = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Sampler:
    """What this rank has for roll-outs. engine and pool: None on a rank that leads no engine. groups: of all engines.

    places: for every engine rank, engine by engine, the trainer rank on whose GPU it runs.
    """

    rollouts: Rollouts
    engine: Engine | None
    pool: RewardPool | None
    groups: tuple[EngineGroup, ...]
    places: tuple[int, ...]


@contextmanager
def open_engines(process: Process, detokenise: Detokenise, *, max_sequence_tokens: int, reads_weights: bool = False) -> Iterator[Sampler]:
    """Start this rank's engine and reward workers, if it leads an engine group; all end with the block.

    Returns at once, while the engines are still loading: call `await_engines` before the first use.
    reads_weights: the engines sample with the weights of model.hf, not with some that are sent to them.
    Raises: RppError, on every rank when it happens on one.
    """
    cfg, groups = process.cfg, process.groups
    count = num_engines(groups.size, cfg.rollout.tp, cfg.rollout.engines)
    all_groups = engine_groups(cfg.rollout.tp, count)
    mine = engine_group(groups.rank, cfg.rollout.tp, count)
    leads = mine is not None and mine.leader == groups.rank
    places = _agree_on_places(process, all_groups, mine if leads else None)
    if cfg.rollout.dtype == "fp8_block":
        _write_engine_dir(process, with_weights=reads_weights)
    with ExitStack() as stack:
        parts: dict[str, object] = {}

        def start() -> None:
            settings = engine_settings(cfg, process, mine, places, max_sequence_tokens=max_sequence_tokens, reads_weights=reads_weights)
            log = process.dir.logs / f"engine-{mine.index}.log"
            parts["engine"] = stack.enter_context(Engine.launch(settings, log=log, deadline_s=ENGINE_SHARE * process.deadline_s))
            stack.enter_context(leaving.tidied(parts["engine"].kill))
            pool = RewardPool(cfg.reward.name, cfg.reward.timeout_s, cfg.reward.num_workers, failed_score=cfg.reward.failed_score)
            parts["pool"] = stack.enter_context(pool)
            stack.enter_context(leaving.tidied(pool.close))
            if not reads_weights:  # a directory's weights may change under its name, and what others wrote must not count as theirs
                vocab_size = read_model(cfg.model.hf).vocab_size
                folder = process.dir.path / "ledger" / process.digest
                parts["ledger"] = Ledger(folder, mine.index, vocab_size=vocab_size, root=process.dir.path)

        process.together("start engines and reward workers", start, here=leads)
        queue = _open_queue(process, len(all_groups), mine.index if leads else None)
        limits = RolloutLimits(total_s=cfg.rollout.deadline_s, quiet_s=cfg.run.deadline_s)
        rollouts = Rollouts(parts.get("engine"), queue, seed=cfg.run.seed, detokenise=detokenise, ledger=parts.get("ledger"), limits=limits)
        with reported(groups.rank):
            yield Sampler(rollouts, parts.get("engine"), parts.get("pool"), all_groups, places)


def await_engines(process: Process, sampler: Sampler, *, version: int | None = None) -> None:
    """Wait until every engine serves. version: of the weights it loaded by itself; None when it will be given some.

    Raises: DeadlineError or EngineError, on every rank when it happens on one.
    """

    start_s = process.cfg.rollout.start_deadline_s

    def wait() -> None:
        sampler.engine.await_ready(start_s, version=version, on_progress=lambda line: process.log.say(f"        {line}"))

    process.together("wait for the engines", wait, here=sampler.engine is not None, longest_s=start_s)
    record_engines(process, sampler)


def record_engines(process: Process, sampler: Sampler) -> None:
    """Note the patches of the processes of every engine, as they now run. Collective. Raises: PatchError."""
    record_patches(process, sampler.engine.info.reports if sampler.engine is not None else ())


def open_path(process: Process, live: LiveWeights, sampler: Sampler) -> WeightPath:
    """The path of the policy's weights into the engines that weights.path asks for.

    Raises: ConfigError or GeometryError for a model that SGLang cannot run, or an engine layout that the direct path does not describe.
    """
    cfg, groups = process.cfg, sampler.groups
    if live.layout.model.not_in_engine:
        raise ConfigError(live.layout.model.not_in_engine, where="rollout")
    is_fp8 = cfg.rollout.dtype == "fp8_block"
    limits = {"bucket_bytes": cfg.weights.bucket_mib * 2**20, "deadline_s": process.deadline_s}
    if cfg.weights.path == "gather":
        return GatherPath(live, sampler.engine, tuple(group.leader for group in groups), is_fp8=is_fp8, **limits)
    target = engine_layout(cfg, live.layout.model, live.layout.dtype, sampler.places)
    mine = engine_group(process.groups.rank, cfg.rollout.tp, len(groups))
    _report_places(process, live, target, mine)
    peers = host_group([group.ranks for group in groups])
    fp8 = Fp8Pair.of(live.layout, target, live.layout.model.hf_shapes) if is_fp8 else None
    return DirectPath(live, sampler.engine, mine, target, peers=peers, fp8=fp8, warn=process.log.warn, **limits)


def engine_layout(cfg: Config, model: Model, dtype: torch.dtype, places: tuple[int, ...]) -> SGLangLayout:
    """Who keeps what in the engines of a run. places: as in Sampler. Raises: ConfigError, GeometryError."""
    return SGLangLayout(
        model,
        tp=cfg.rollout.tp,
        dtype=dtype,
        ep=int(cfg.rollout.sglang.get("ep_size") or 1),
        attn_dp=int(cfg.rollout.sglang.get("attn_dp_size") or 1),
        engines=len(places) // cfg.rollout.tp,
        places=places,
    )


def places_of(cfg: Config, group: EngineGroup, count: int) -> tuple[int, ...]:
    """For each rank of one of `count` engines the trainer rank of its group on whose GPU it finds most of its weights."""
    if cfg.weights.path == "gather":
        return group.ranks
    dtype = getattr(torch, cfg.model.dtype)
    try:
        model = describe(read_json(cfg.model.hf / "config.json"))
        everyone = engine_layout(cfg, model, dtype, tuple(range(count * cfg.rollout.tp)))
        return best_devices(planned_layout(model, cfg.parallel, dtype), everyone, engine=group.ranks)
    except RppError:
        return group.ranks  # `open_path`, or the policy, refuses what does not fit, and it knows more


def _agree_on_places(process: Process, groups: tuple[EngineGroup, ...], led: EngineGroup | None) -> tuple[int, ...]:
    """Each leader works out the order of its engine; all ranks know all orders."""
    mine = places_of(process.cfg, led, len(groups)) if led is not None else ()
    found = gather_objects(mine, process.groups.world_cpu, name="places of the engines", deadline_s=process.deadline_s)
    return tuple(rank for places in found for rank in places)


def _report_places(process: Process, live: LiveWeights, target: SGLangLayout, mine: EngineGroup | None) -> None:
    """Say how much of the weights need not travel, and how much the order of the engines' ranks adds to that."""
    counts = None
    if mine is not None and mine.leader == process.groups.rank:
        kept, total = kept_bytes(live.layout, target, mine.ranks)
        plain = tuple(sorted(target.places))
        before = kept if target.places == plain else kept_bytes(live.layout, replace(target, places=plain), mine.ranks)[0]
        counts = kept, total, before
    found = gather_objects(counts, process.groups.world_cpu, name="bytes that stay", deadline_s=process.deadline_s)
    if process.is_first:
        kept, total, before = (sum(column) for column in zip(*filter(None, found), strict=True))
        order = "" if kept == before else f", {kept - before} of them by the order of the engines' ranks"
        process.log.say(f"        weights: {kept} of {total} bytes stay on their GPU at each update{order}")


def _write_engine_dir(process: Process, *, with_weights: bool) -> None:
    """The directory of the engines in FP8, by the first rank for all of them. Collective."""
    cfg, folder = process.cfg, process.dir.path / engine_dir.FOLDER
    dtype = getattr(torch, cfg.model.dtype)
    process.together(
        f"write {folder}",
        lambda: engine_dir.write_engine_dir(folder, cfg.model.hf, dtype=dtype, with_weights=with_weights),
        here=process.is_first,
        longest_s=cfg.rollout.start_deadline_s,
    )


def engine_settings(
    cfg: Config, process: Process, group: EngineGroup, places: tuple[int, ...], *, max_sequence_tokens: int, reads_weights: bool = False
) -> EngineSettings:
    """What the engine of a group is started with. places: as in Sampler. reads_weights: as in open_engines."""
    world, tp, is_fp8 = process.world, cfg.rollout.tp, cfg.rollout.dtype == "fp8_block"
    index, count = group.index, len(places) // tp
    per_host = max(1, world.local_size // tp)
    is_cuda = process.device.type == "cuda"
    capability = torch.cuda.get_device_capability(process.device)[0] if is_cuda else None
    fp8_args = engine_dir.server_args(reads_weights=reads_weights, capability=capability) if is_fp8 else {}
    own = places[index * tp : (index + 1) * tp]
    return EngineSettings(
        hf=str((process.dir.path / engine_dir.FOLDER).absolute() if is_fp8 else cfg.model.hf),
        dtype=cfg.model.dtype,
        device="cuda" if is_cuda else "cpu",
        tp=tp,
        slot=index % per_host,
        slots_on_host=min(count, per_host),
        gpu_ids=group.local_ids(own, local_rank=world.local_rank) if is_cuda else (),
        max_concurrent=cfg.rollout.max_concurrent,
        max_sequence_tokens=max_sequence_tokens,
        seed=cfg.run.seed,
        sglang=fp8_args | cfg.rollout.sglang,
    )


def _open_queue(process: Process, num_leaders: int, index: int | None) -> WorkQueue:
    """The queue that all leaders share, in the store of the run. index: of this leader."""
    if num_leaders == 1 or index is None:
        return WorkQueue()
    store = run_store().clone()  # a connection of its own, so that no other wait holds it
    store.set_timeout(timedelta(seconds=process.deadline_s))
    return WorkQueue(store, leader=index, num_leaders=num_leaders)
