"""Ranks on gloo that are stopped, or slow: who is named, how soon, and that nothing of the run is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.dist.ranks import free_port

ROOT = Path(__file__).parents[2]
RANK = str(Path(__file__).with_name("silent_rank.py"))
DEADLINE_S = 10.0
END_S = 20.0  # from a rank's report to the end of the last process, on a busy host too

LAUNCHER = """
import sys
from pathlib import Path
from megatron_rpp import launch
command = [sys.executable, *sys.argv[1:-1]]
sys.exit(launch.run_ranks(command, 2, log_dir=Path(sys.argv[-1]), is_cpu=True, silence_s=float(sys.argv[3])))
"""


class Run:
    """A run of two ranks: by the launcher of `rpp train`, or each rank by itself, as torchrun and srun do."""

    def __init__(self, behavior: str, notes: Path, *, by_launcher: bool = True, deadline_s: float = DEADLINE_S) -> None:
        self.notes = notes
        env = {**os.environ, "NOTES": str(notes), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        words = [RANK, behavior, str(deadline_s)]
        commands, places = [[sys.executable, "-c", LAUNCHER, *words, str(notes / "logs")]], [{}]
        if not by_launcher:
            shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            commands = [[sys.executable, *words]] * 2
            places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        self.processes = [
            subprocess.Popen(command, env={**env, **place}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            for command, place in zip(commands, places, strict=True)
        ]

    def pid(self, rank: int) -> int:
        return int((self.notes / f"pid-{rank}").read_text())

    def await_ready(self) -> None:
        limit = time.monotonic() + 150
        while not all((self.notes / f"ready-{rank}").exists() for rank in (0, 1)):
            ended = [process.communicate()[1] for process in self.processes if process.poll() is not None]
            assert not ended and time.monotonic() < limit, f"not ready: {ended}"
            time.sleep(0.02)

    def stop(self, rank: int) -> float:
        """Stop a rank once all are ready; when."""
        self.await_ready()
        time.sleep(DEADLINE_S / 5)  # four beats in the phase
        os.kill(self.pid(rank), signal.SIGSTOP)
        return time.monotonic()

    def wait(self, number: int = 0) -> tuple[int, str]:
        """Exit code and standard error of one of the processes, which must end by itself."""
        _, errors = self.processes[number].communicate(timeout=120)
        return self.processes[number].returncode, errors

    def left(self) -> list[int]:
        pids = [int(path.read_text()) for path in self.notes.glob("pid-*")]
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All runs of this file, started at once: most of the time of each is a wait."""
    kinds = {
        "collective": {},
        "roll_out": {},
        "roll_out by itself": {"by_launcher": False},
        "long_roll_out": {"deadline_s": 5.0},
        "absent": {"by_launcher": False},
    }
    started = {name: Run(name.partition(" ")[0], tmp_path_factory.mktemp("run"), **named) for name, named in kinds.items()}
    try:
        yield started
    finally:
        for run in started.values():
            run.close()


@pytest.fixture(scope="module")
def stopped(runs: dict[str, Run]) -> dict[str, float]:
    """When a rank was stopped: rank 1 in a collective, rank 0, which hosts the store, in a roll-out."""
    return {
        name: runs[name].stop(silent) for name, silent in (("collective", 1), ("roll_out", 0), ("roll_out by itself", 0))
    }


def test_a_rank_that_is_stopped_in_a_collective_is_named_in_time_and_nothing_is_left(
    runs: dict[str, Run], stopped: dict[str, float]
) -> None:
    code, errors = runs["collective"].wait()
    took_s = time.monotonic() - stopped["collective"]
    assert code == 1
    assert "rank 0, update: rank 1 has been silent for" in errors
    assert "the last one said: update for" in errors
    assert "Traceback" not in errors
    assert took_s < DEADLINE_S + END_S
    assert not runs["collective"].left()


def test_a_host_of_the_store_that_is_stopped_in_its_roll_out_is_named_in_time_and_nothing_is_left(
    runs: dict[str, Run], stopped: dict[str, float]
) -> None:
    """No request to the store returns, and the other rank is in a wait with a limit of an hour."""
    code, errors = runs["roll_out"].wait()
    assert code == 1
    assert "rank 1, wait 'roll-out 3': rank 0 has been silent for" in errors
    assert "the last one said: sampling step 3 for" in errors
    assert "Traceback" not in errors
    assert not runs["roll_out"].left()


def test_without_our_launcher_a_rank_prints_who_is_silent_and_leaves(runs: dict[str, Run], stopped: dict[str, float]) -> None:
    code, errors = runs["roll_out by itself"].wait(1)
    assert code == 1
    assert errors.startswith("rank 1, wait 'roll-out 3': rank 0 has been silent for")
    assert "the last one said: sampling step 3 for" in errors
    assert "Traceback" not in errors
    assert runs["roll_out by itself"].left() == [runs["roll_out by itself"].pid(0)]  # its launcher's to end


def test_a_roll_out_that_takes_several_deadlines_is_not_silence(runs: dict[str, Run]) -> None:
    assert runs["long_roll_out"].wait() == (0, "")


def test_a_wait_that_runs_out_says_what_the_absent_rank_is_doing_and_the_process_leaves(runs: dict[str, Run]) -> None:
    """The absent rank beats, so it is not silent. The group's own time out is a year."""
    code, errors = runs["absent"].wait(0)
    assert code == 1
    assert "wait 'checkpoint files': rank 0 waited longer than 4 s" in errors
    assert "last seen: rank 1: save for" in errors
    assert "Traceback" not in errors
