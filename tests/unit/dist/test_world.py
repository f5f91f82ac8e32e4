"""Reading a process's place from what its launcher set."""

from __future__ import annotations

import pytest

from megatron_rpp.dist.world import FIRST_PORT, NUM_PORTS, World
from megatron_rpp.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
}


def test_without_a_launcher_the_process_is_alone() -> None:
    assert World.from_env({"PATH": "/bin"}) == World(0, 1, 0, 1, 1, "127.0.0.1", 0, "single")


def test_torchruns_variables_are_read() -> None:
    assert World.from_env(TORCHRUN) == World(5, 8, 1, 4, 2, "10.0.0.1", 29500, "torchrun", is_one_host=False)


def test_one_host_is_assumed_when_only_the_classic_variables_are_set() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert World.from_env(env) == World(1, 2, 1, 2, 1, "127.0.0.1", 1234, "torchrun")


def test_a_slurm_steps_variables_are_read() -> None:
    """16 * 4711 + 2 = 75378 = 6 * 12000 + 3378."""
    assert World.from_env(SLURM) == World(5, 8, 1, 4, 2, "gpu003", 23378, "slurm", is_one_host=False)


def test_a_port_and_an_address_that_the_user_set_win_over_the_derived_ones() -> None:
    world = World.from_env(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "40001"})
    assert (world.master_addr, world.master_port) == ("head", 40001)


def test_derived_ports_are_safe_and_differ_between_neighbouring_jobs_and_steps() -> None:
    steps = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(900000, 900050) for step in range(4)]
    ports = {World.from_env(SLURM | step).master_port for step in steps}
    assert len(ports) == 200
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + NUM_PORTS <= 32768


def test_every_process_of_a_step_derives_the_same_meeting_place() -> None:
    places = set()
    for rank in range(8):
        env = SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 4), "SLURM_NODEID": str(rank // 4)}
        places.add((World.from_env(env).master_addr, World.from_env(env).master_port))
    assert places == {("gpu003", 23378)}


def test_nodes_may_hold_different_numbers_of_processes() -> None:
    env = SLURM | {"SLURM_NTASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "4,1", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert World.from_env(env).local_size == 1


def test_the_jobs_node_list_serves_where_the_step_has_none() -> None:
    env = {key: value for key, value in SLURM.items() if key not in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")}
    world = World.from_env(env | {"SLURM_NODELIST": "a7,b[1]"})
    assert (world.master_addr, world.num_nodes, world.local_size) == ("a7", 2, 4)


def test_the_interactive_step_of_salloc_is_one_process() -> None:
    env = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert World.from_env(env | {"SLURM_STEP_NODELIST": "gpu003", "SLURM_STEP_ID": "4294967290"}).size == 1


def test_torchruns_agent_inside_srun_counts() -> None:
    assert World.from_env(SLURM | TORCHRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}).launcher == "torchrun"


def test_two_launchers_that_agree_are_no_contradiction() -> None:
    env = SLURM | TORCHRUN
    del env["TORCHELASTIC_RUN_ID"]
    assert World.from_env(env).rank == 5


def test_inside_an_allocation_but_not_under_srun_the_process_is_alone() -> None:
    assert World.from_env({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}).launcher == "single"
    assert World.from_env({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).launcher == "single"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT missing"),
        ({"WORLD_SIZE": "2"}, "half set"),
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_PORT"}, "MASTER_PORT missing"),
        (TORCHRUN | {"RANK": "8"}, "0 <= rank < 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "0 <= local rank < 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "1 <= local size <= 8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK: not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE: not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "size >= 1"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "master port <= 65535"),
        ({"SLURM_PROCID": "3"}, "Slurm step are only half set"),
        ({key: value for key, value in SLURM.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID missing"),
        ({key: value for key, value in SLURM.items() if key != "SLURM_JOB_ID"}, "no port to meet on"),
        (SLURM | {"SLURM_PROCID": "8"}, "0 <= rank < 8"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, "12 processes on 3 nodes"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "some"}, "SLURM_STEP_TASKS_PER_NODE: cannot read"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[3-"}, "SLURM_STEP_NODELIST: cannot read"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, "srun did not start this process"),
        ({k: v for k, v in (SLURM | TORCHRUN).items() if k != "TORCHELASTIC_RUN_ID"} | {"SLURM_PROCID": "4"}, "two launchers contradict"),
    ],
)
def test_half_set_or_contradictory_variables_are_one_clear_error(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        World.from_env(env)
    assert message in str(caught.value)


def test_ranks_on_one_host_meet_on_the_loopback_interface_unless_torchruns_agent_hosts_the_store() -> None:
    one_host = TORCHRUN | {"WORLD_SIZE": "4", "RANK": "1", "GROUP_WORLD_SIZE": "1"}
    world = World.from_env(one_host)
    assert (world.master_addr, world.is_one_host, world.has_agent_store) == ("127.0.0.1", True, False)
    world = World.from_env(one_host | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (world.master_addr, world.is_one_host, world.has_agent_store) == ("10.0.0.1", True, True)
    assert (world.attempt, World.from_env(one_host | {"TORCHELASTIC_RESTART_COUNT": "2"}).attempt) == (0, 2)
    unknown = {name: value for name, value in one_host.items() if name not in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")}
    world = World.from_env(unknown)
    assert (world.master_addr, world.is_one_host) == ("10.0.0.1", False)
    step = SLURM | {"SLURM_STEP_NODELIST": "gpu003", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "4"}
    world = World.from_env(step | {"MASTER_ADDR": "gpu003"})
    assert (world.master_addr, world.is_one_host) == ("127.0.0.1", True)
