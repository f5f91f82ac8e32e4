"""The engines of a run: every leader starts its own, all share one queue of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.delivery import DirectPath, GatherPath, WeightPath
from megatron_rpp.dist.collectives import broadcast_object
from megatron_rpp.dist.layout import EngineGroup, engine_group, engine_groups, num_engines
from megatron_rpp.process import Process, record_patches
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.generate import RolloutLimits, Rollouts
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.rollout.queue import WorkQueue, open_store
from megatron_rpp.rollout.settings import EngineSettings
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.sglang_layout import SGLangLayout

Detokenise = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Sampler:
    """What this rank has for roll-outs. engine and pool: None on a rank that leads no engine. groups: of all engines."""

    rollouts: Rollouts
    engine: Engine | None
    pool: RewardPool | None
    groups: tuple[EngineGroup, ...]


@contextmanager
def open_engines(process: Process, detokenise: Detokenise, *, max_sequence_tokens: int) -> Iterator[Sampler]:
    """Start this rank's engine and reward workers, if it leads an engine group; all end with the block.

    Returns at once, while the engines are still loading: call `await_engines` before the first use.
    Raises: RppError, on every rank when it happens on one.
    """
    cfg, groups = process.cfg, process.groups
    count = num_engines(groups.size, cfg.rollout.tp, cfg.rollout.engines)
    all_groups = engine_groups(cfg.rollout.tp, count)
    mine = engine_group(groups.rank, cfg.rollout.tp, count)
    leads = mine is not None and mine.leader == groups.rank
    with ExitStack() as stack:
        parts: dict[str, object] = {}

        def start() -> None:
            settings = engine_settings(cfg, process, index=mine.index, count=count, max_sequence_tokens=max_sequence_tokens)
            parts["engine"] = stack.enter_context(Engine.launch(settings, log=process.dir.logs / f"engine-{mine.index}.log"))
            pool = RewardPool(cfg.reward.name, cfg.reward.timeout_s, cfg.reward.num_workers, failed_score=cfg.reward.failed_score)
            parts["pool"] = stack.enter_context(pool)
            parts["ledger"] = Ledger(process.dir.path / "ledger" / process.digest, mine.index)

        process.together("start engines and reward workers", start, here=leads)
        queue = _open_queue(process, tuple(group.leader for group in all_groups), mine.index if leads else None)
        limits = RolloutLimits(total_s=cfg.rollout.deadline_s, quiet_s=cfg.run.deadline_s)
        rollouts = Rollouts(parts.get("engine"), queue, seed=cfg.run.seed, detokenise=detokenise, ledger=parts.get("ledger"), limits=limits)
        yield Sampler(rollouts, parts.get("engine"), parts.get("pool"), all_groups)


def await_engines(process: Process, sampler: Sampler, *, version: int | None = None) -> None:
    """Wait until every engine serves. version: of the weights it loaded by itself; None when it will be given some.

    Raises: DeadlineError or EngineError, on every rank when it happens on one.
    """

    start_s = process.cfg.rollout.start_deadline_s

    def wait() -> None:
        sampler.engine.await_ready(start_s, version=version, on_progress=lambda line: process.log.say(f"        {line}"))

    process.together("wait for the engines", wait, here=sampler.engine is not None, longest_s=start_s)
    record_patches(process, sampler.engine.info.reports if sampler.engine is not None else ())


def open_path(process: Process, live: LiveWeights, sampler: Sampler) -> WeightPath:
    """The path of the policy's weights into the engines that weights.path asks for.

    Raises: ConfigError or GeometryError for a model or an engine layout that the direct path does not describe.
    """
    cfg, groups = process.cfg, sampler.groups
    limits = {"bucket_bytes": cfg.weights.bucket_mib * 2**20, "deadline_s": process.deadline_s}
    if cfg.weights.path == "gather":
        return GatherPath(live, sampler.engine, tuple(group.leader for group in groups), **limits)
    target = SGLangLayout(
        live.layout.model,
        tp=cfg.rollout.tp,
        dtype=live.layout.dtype,
        ep=int(cfg.rollout.sglang.get("ep_size") or 1),
        attn_dp=int(cfg.rollout.sglang.get("attn_dp_size") or 1),
        engines=len(groups),
        places=tuple(rank for group in groups for rank in group.ranks),
    )
    mine = engine_group(process.groups.rank, cfg.rollout.tp, len(groups))
    return DirectPath(live, sampler.engine, mine, target, **limits)


def engine_settings(cfg: Config, process: Process, *, index: int, count: int, max_sequence_tokens: int) -> EngineSettings:
    """What engine `index` of `count` is started with."""
    world = process.world
    per_host = max(1, world.local_size // cfg.rollout.tp)
    is_cuda = process.device.type == "cuda"
    first_gpu = world.local_rank
    return EngineSettings(
        hf=str(cfg.model.hf),
        dtype=cfg.model.dtype,
        device="cuda" if is_cuda else "cpu",
        tp=cfg.rollout.tp,
        slot=index % per_host,
        slots_on_host=min(count, per_host),
        gpu_ids=tuple(range(first_gpu, first_gpu + cfg.rollout.tp)) if is_cuda else (),
        max_concurrent=cfg.rollout.max_concurrent,
        max_sequence_tokens=max_sequence_tokens,
        seed=cfg.run.seed,
        sglang=cfg.rollout.sglang,
    )


def _open_queue(process: Process, leaders: tuple[int, ...], index: int | None) -> WorkQueue:
    """The queue that all leaders share. Collective: the first leader hosts the store and tells the others its port."""
    if len(leaders) == 1:
        return WorkQueue()
    host, deadline_s = process.world.master_addr, process.deadline_s
    store = open_store(host, 0, is_host=True, deadline_s=deadline_s) if index == 0 else None
    mine = store.port if store is not None else None
    port = broadcast_object(mine, process.groups.world_cpu, src=leaders[0], name="port of the queue", deadline_s=deadline_s)
    if index is None:
        return WorkQueue()
    store = store or open_store(host, port, is_host=False, deadline_s=deadline_s)
    return WorkQueue(store, leader=index, num_leaders=len(leaders))
