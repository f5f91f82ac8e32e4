"""Opening and closing Megatron-Core in this process: patches, process groups, parallel state, seeds.

Nothing else may import megatron before `start` has run, because the patches act while megatron is being imported. For that
reason the modules beside this one that import megatron are themselves imported inside functions of `policy`.
"""

from __future__ import annotations

import os
import random
import warnings
from datetime import timedelta

import numpy as np
import torch
from torch import distributed as dist

import megatron_rpp_patches
from megatron_rpp.config.schema import Config, Parallel
from megatron_rpp.dist.deadline import deadline
from megatron_rpp.dist.groups import UNBOUNDED, Groups
from megatron_rpp.dist.layout import ExpertCoords, coords_of, expert_coords_of, world_size_of
from megatron_rpp.dist.store import open_run_store
from megatron_rpp.dist.world import World
from megatron_rpp.errors import ConfigError, GeometryError


def start(cfg: Config, world: World) -> Groups:
    """Make this process a Megatron rank. Every rank of the run calls it once, before it touches a model.

    Order: check the layout against the world, patches, default process group (gloo on CPU, nccl on CUDA; both wait at most
    `run.deadline_s`), Megatron's parallel state, seeds.
    Raises: GeometryError when tp x cp x dp x pp is not the number of processes, or ep x etp does not divide those of a stage;
    ConfigError when CUDA is asked for and absent, or rank 0 cannot listen; StoreError when a stranger writes to the store;
    PatchError when a patch does not fit the installed megatron-core; DeadlineError when a rank does not come.
    """
    _check_world(cfg.parallel, world)
    device = device_of(cfg, world)
    _silence_known_warnings()
    megatron_rpp_patches.apply("megatron_core")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=cfg.run.deadline_s)
    _keep_gloo_on_this_host(world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = open_run_store(world, cfg.run.dir, cfg.run.deadline_s)
    waiting_for = f"the addresses of {world.size} ranks in the store of the run"
    with deadline("join the run", cfg.run.deadline_s, rank=world.rank, waiting_for=waiting_for):
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    _init_parallel_state(cfg.parallel, cfg.run.deadline_s)
    megatron_rpp_patches.verify("megatron_core")  # every patch stands and does what it is for, before a model is built
    _seed(cfg.run.seed)
    return _groups(cfg.parallel, world, timeout)


def stop() -> None:
    """Take down what `start` made. Harmless when it never ran or ran halfway."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def device_of(cfg: Config, world: World) -> torch.device:
    """The device this rank computes on.

    Raises: ConfigError when the configuration asks for CUDA and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if cfg.run.device == "cuda" and not has_cuda:
        raise ConfigError("no CUDA device is visible", where="run.device", expected="a GPU", got="none", fix="set run.device: cpu or auto")
    if cfg.run.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank)


def _silence_known_warnings() -> None:
    """Megatron says on every import what a machine without Transformer Engine and Apex lacks, and torch 2.13 what megatron-core
    0.16 still calls. Nobody who runs this can act on either, and on N ranks they hide what matters."""
    for module in (r"megatron\.core", r"torch\.distributed"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def _check_world(parallel: Parallel, world: World) -> None:
    wanted = world_size_of(parallel)
    if wanted != world.size:
        raise GeometryError(
            "the layout does not fit the number of processes",
            where="parallel",
            expected=f"tp {parallel.tp} x cp {parallel.cp} x dp {parallel.dp} x pp {parallel.pp} = {wanted} processes",
            got=f"{world.size} ({world.launcher})",
            fix=f"start {wanted} processes, or set parallel.dp so that the product is {world.size}",
        )
    expert_coords_of(world.rank, parallel)
    if parallel.vpp > 1 and parallel.pp == 1:
        raise GeometryError("virtual pipeline chunks need a pipeline", where="parallel.vpp", expected="1 where pp is 1", got=parallel.vpp)


def _keep_gloo_on_this_host(world: World) -> None:
    """If all ranks are on one host, gloo listens on the loopback interface, not on the address of the host's name."""
    if world.is_one_host:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _init_parallel_state(parallel: Parallel, deadline_s: float) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,  # Megatron's own default is tp
        distributed_timeout_minutes=deadline_s / 60,  # a timedelta's argument: whole minutes would make a deadline of 5 s a minute
    )


def _seed(seed: int) -> None:
    """The same seed on all ranks; Megatron's tracker spreads it over tensor-parallel ranks where that matters."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _groups(parallel: Parallel, world: World, timeout: timedelta) -> Groups:
    from megatron.core import parallel_state

    coords = coords_of(world.rank, parallel)
    seen = type(coords)(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
    )
    expert_coords = expert_coords_of(world.rank, parallel)
    seen_experts = ExpertCoords(
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )
    assert seen == coords, f"megatron orders ranks otherwise than dist.layout: {seen} is not {coords}"
    assert seen_experts == expert_coords, f"megatron orders experts otherwise than dist.layout: {seen_experts} is not {expert_coords}"
    return Groups(
        coords=coords,
        world=dist.group.WORLD,
        world_cpu=dist.new_group(backend="gloo", timeout=UNBOUNDED),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        model=_model_group(parallel, coords.dp, timeout),
        expert_coords=expert_coords,
        ep_size=parallel.ep,
        etp_size=parallel.etp,
        expert_dp=parallel_state.get_expert_data_parallel_group(),
    )


def _model_group(parallel: Parallel, dp_rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """tp x cp x pp of one dp rank; Megatron's own model-parallel group leaves cp out. Collective: all ranks make all groups."""
    mine = None
    for dp in range(parallel.dp):
        ranks = [rank for rank in range(world_size_of(parallel)) if coords_of(rank, parallel).dp == dp]
        group = dist.new_group(ranks, timeout=timeout)
        mine = group if dp == dp_rank else mine
    assert mine is not None
    return mine
