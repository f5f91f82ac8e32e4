"""Who this process is among all of them. The only reader of the variables that a launcher sets.

Three launchers are understood: torchrun (or anything that sets its variables), Slurm's srun, and none at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_rpp.dist.hostlist import expand_hosts, expand_tasks_per_node
from megatron_rpp.errors import ConfigError

Launcher = Literal["single", "torchrun", "slurm"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Any of these means that srun started this process. SLURM_PROCID alone does not: batch scripts see it too, as 0.
_SLURM_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")

# Below Linux's ephemeral ports (32768 and up), so that no outgoing connection can sit on a derived port.
FIRST_PORT, NUM_PORTS = 20000, 12000
LOOPBACK = "127.0.0.1"  # where the ranks meet if all are on one host


@dataclass(frozen=True, slots=True)
class World:
    """This process's place.

    master_addr, master_port: where the ranks meet; port 0 (single process only) means any that is free.
    is_one_host: all ranks are on this host, by LOCAL_WORLD_SIZE, GROUP_WORLD_SIZE or MASTER_ADDR; False if none of them says so.
    has_agent_store: torchrun's agent hosts the store there, instead of rank 0.
    attempt: how often that agent has restarted the ranks. Its store keeps what earlier attempts wrote.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    num_nodes: int = 1
    master_addr: str = LOOPBACK
    master_port: int = 0
    launcher: Launcher = "single"
    is_one_host: bool = True
    has_agent_store: bool = False
    attempt: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> World:
        """Reads torchrun's variables, else those of a Slurm step, else answers with one process.

        torchrun: RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT.
        Slurm: SLURM_PROCID SLURM_NTASKS (or SLURM_STEP_NUM_TASKS) SLURM_LOCALID, the node list and the tasks per node;
        MASTER_ADDR and MASTER_PORT win over the first host and the port made from the job and step ids.
        Torchrun's agent inside srun sets both families; then torchrun's count.
        Raises: ConfigError when a family is half set, a value is no number, or the values contradict one another.
        """
        is_step = any(name in env for name in _SLURM_STEP)
        if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            world = _from_torchrun(env)
            if is_step and "TORCHELASTIC_RUN_ID" not in env:
                _agree(world, _from_slurm(env))
        elif is_step or env.get("SLURM_PROCID", "0") not in ("", "0"):
            world = _from_slurm(env)
        else:
            _refuse_forgotten_launcher(env)
            world = cls()
        return _checked(world)


def _from_torchrun(env: Mapping[str, str]) -> World:
    missing = [name for name in _TORCHRUN if not env.get(name)]
    if missing:
        raise ConfigError(
            "the launcher's variables are only half set",
            where="environment",
            expected=f"all of {' '.join(_TORCHRUN)}, or none of them",
            got=f"{' '.join(missing)} missing",
            fix="start with torchrun or srun, or unset " + " ".join(name for name in _TORCHRUN if name in env),
        )
    size = _number(env, "WORLD_SIZE")
    local_size = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else size
    num_nodes = _number(env, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in env else max(1, -(-size // max(1, local_size)))
    has_agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_known = "LOCAL_WORLD_SIZE" in env or "GROUP_WORLD_SIZE" in env or env["MASTER_ADDR"] in (LOOPBACK, "localhost")
    is_one_host = num_nodes == 1 and is_known
    return World(
        rank=_number(env, "RANK"),
        size=size,
        local_rank=_number(env, "LOCAL_RANK"),
        local_size=local_size,
        num_nodes=num_nodes,
        master_addr=LOOPBACK if is_one_host and not has_agent_store else env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
        launcher="torchrun",
        is_one_host=is_one_host,
        has_agent_store=has_agent_store,
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in env else 0,
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    # The interactive step of salloc counts its own single task in SLURM_STEP_NUM_TASKS while SLURM_NTASKS holds the job's.
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    nodes_name = _first_set(env, "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST") or "SLURM_STEP_NODELIST"
    missing = [name for name in ("SLURM_PROCID", size_name, "SLURM_LOCALID", nodes_name) if not env.get(name)]
    if missing:
        raise ConfigError(
            "the variables of the Slurm step are only half set",
            where="environment",
            expected="SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_STEP_NODELIST",
            got=f"{' '.join(missing)} missing",
            fix="start the processes with srun, and pass its environment on (containers often drop it)",
        )
    hosts = expand_hosts(env[nodes_name], where=nodes_name)
    size = _number(env, size_name)
    return World(
        rank=_number(env, "SLURM_PROCID"),
        size=size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=_slurm_local_size(env, size, len(hosts)),
        num_nodes=len(hosts),
        master_addr=LOOPBACK if len(hosts) == 1 else env.get("MASTER_ADDR") or hosts[0],
        master_port=_number(env, "MASTER_PORT") if env.get("MASTER_PORT") else _slurm_port(env),
        launcher="slurm",
        is_one_host=len(hosts) == 1,
    )


def _slurm_local_size(env: Mapping[str, str], size: int, num_nodes: int) -> int:
    name = _first_set(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if name is None:
        if size % num_nodes == 0:
            return size // num_nodes
        raise ConfigError(
            "cannot tell how many processes each node has",
            where="environment",
            expected="SLURM_STEP_TASKS_PER_NODE",
            got=f"{size} processes on {num_nodes} nodes and no such variable",
        )
    per_node = expand_tasks_per_node(env[name], where=name)
    if len(per_node) != num_nodes or sum(per_node) != size:
        raise ConfigError(
            "the Slurm variables contradict one another",
            where=name,
            expected=f"{size} processes on {num_nodes} nodes",
            got=f"{env[name]}, that is {sum(per_node)} processes on {len(per_node)} nodes",
        )
    return per_node[_number(env, "SLURM_NODEID")] if len(set(per_node)) > 1 else per_node[0]


def _slurm_port(env: Mapping[str, str]) -> int:
    """The same port on every process of a step; neighbouring jobs and steps get different ones."""
    job = _first_set(env, "SLURM_JOB_ID", "SLURM_JOBID")
    if job is None:
        raise ConfigError("no port to meet on", where="environment", expected="SLURM_JOB_ID, or MASTER_PORT", got="neither")
    step = _first_set(env, "SLURM_STEP_ID", "SLURM_STEPID")
    return FIRST_PORT + (16 * _number(env, job) + (0 if step is None else _number(env, step))) % NUM_PORTS


def _refuse_forgotten_launcher(env: Mapping[str, str]) -> None:
    num_tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in env and num_tasks not in ("", "1"):
        raise ConfigError(
            f"this is a Slurm job of {num_tasks} tasks, but srun did not start this process",
            where="environment",
            expected="SLURM_STEP_ID and SLURM_STEP_NODELIST, which srun sets",
            got="SLURM_PROCID and SLURM_NTASKS of the batch script itself",
            fix="put srun before the command; for one process alone: env -u SLURM_PROCID -u SLURM_NTASKS <command>",
        )


def _agree(torchrun: World, slurm: World) -> None:
    for name in ("rank", "size", "local_rank"):
        if getattr(torchrun, name) != getattr(slurm, name):
            raise ConfigError(
                f"two launchers contradict one another about this process's {name}",
                where="environment",
                expected="the same from torchrun's and Slurm's variables",
                got=f"torchrun's {getattr(torchrun, name)}, Slurm's {getattr(slurm, name)}",
                fix="unset RANK WORLD_SIZE LOCAL_RANK to let srun's count",
            )


def _checked(world: World) -> World:
    rules = (
        (world.size >= 1, "size >= 1", world.size),
        (0 <= world.rank < world.size, f"0 <= rank < {world.size}", world.rank),
        (1 <= world.local_size <= world.size, f"1 <= local size <= {world.size}", world.local_size),
        (0 <= world.local_rank < world.local_size, f"0 <= local rank < {world.local_size}", world.local_rank),
        (1 <= world.num_nodes <= world.size, f"1 <= nodes <= {world.size}", world.num_nodes),
        (world.launcher == "single" or 1 <= world.master_port <= 65535, "1 <= master port <= 65535", world.master_port),
    )
    for holds, rule, got in rules:
        if not holds:
            raise ConfigError(f"the variables of {world.launcher} contradict one another", where="environment", expected=rule, got=got)
    return world


def _first_set(env: Mapping[str, str], *names: str) -> str | None:
    """The first of some variables that is set and not empty."""
    return next((name for name in names if env.get(name)), None)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not re.fullmatch(r"\d+", text):
        raise ConfigError("not a whole number", where=name, expected="a number such as 8", got=repr(text))
    return int(text)
