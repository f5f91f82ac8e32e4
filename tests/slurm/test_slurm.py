"""srun as the launcher, on a real Slurm: the ranks find their places, and the shipped job script does what its comments say."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SECOND_NODE, Cluster

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
# Short jobs: the script's warning ten minutes before the limit would come at once.
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=5", "--signal=USR1@20")

# Stands in for Python in the job script: writes down how it was called, then waits to be told that time is running out.
RECORDER = f"""#!{sys.executable}
import os, signal, sys, time

def record(line):
    with open(os.environ["RECORD"], "a") as file:
        file.write(line + "\\n")

task = os.environ["SLURM_PROCID"]
ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
signal.signal(signal.SIGUSR1, lambda *_: (record("saved " + task), os._exit(0)))
record("task " + task + " in " + os.getcwd() + ": " + " ".join(sys.argv[1:]) + ("" if ignored else " and could die of a warning"))
time.sleep(60)
sys.exit(3)
"""


@pytest.fixture
def job_dir(tmp_path: Path) -> Path:
    recorder = tmp_path / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    return tmp_path


def submit(cluster: Cluster, job_dir: Path, *options: str, arguments: tuple[str, ...] = ("run.yaml", "run.steps=3")) -> str:
    exports = f"--export=ALL,RPP_PYTHON={job_dir / 'python'},RECORD={job_dir / 'record'}"
    return cluster.call("sbatch", "--parsable", exports, *SMALL, *options, str(SBATCH), *arguments, cwd=job_dir).strip()


def record(job_dir: Path) -> list[str]:
    path = job_dir / "record"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_four_tasks_on_two_nodes_agree_on_their_places_and_reduce_over_gloo(cluster: Cluster) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}
    running = Cluster(cluster.folder, {**env, "SLURM_CONF": cluster.env["SLURM_CONF"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    script = str(ROOT / "tests" / "slurm" / "gather_world.py")
    output = running.call("srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, script, timeout_s=120)
    places = sorted((json.loads(line) for line in output.splitlines() if line.startswith("{")), key=lambda place: place["rank"])
    assert [place["rank"] for place in places] == [0, 1, 2, 3]
    assert [place["local_rank"] for place in places] == [0, 1, 0, 1]
    assert [place["node"] == SECOND_NODE for place in places] == [False, False, True, True]
    assert {(place["size"], place["local_size"], place["num_nodes"], place["launcher"]) for place in places} == {(4, 2, 2, "slurm")}
    assert len({(place["master_addr"], place["master_port"]) for place in places}) == 1
    assert [place["sum"] for place in places] == [10.0] * 4


def test_the_job_script_starts_one_rank_for_each_task_in_the_directory_of_sbatch(cluster: Cluster, job_dir: Path) -> None:
    job = submit(cluster, job_dir)
    cluster.wait_for_state(job, "RUNNING", "COMPLETED", timeout_s=30)
    wait_for_lines(job_dir, 4)
    assert record(job_dir) == [f"task {task} in {job_dir}: -m megatron_rpp train run.yaml run.steps=3" for task in range(4)]
    cluster.call("scancel", "--signal=USR1", job)  # without --batch: to the tasks, as the time limit's signal goes
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=30) == "COMPLETED"
    assert record(job_dir)[:4] == [f"saved {task}" for task in range(4)]


@pytest.mark.slow
def test_every_rank_is_told_before_the_time_limit(cluster: Cluster, job_dir: Path) -> None:
    assert "\n#SBATCH --signal=USR1@600\n" in SBATCH.read_text()
    job = submit(cluster, job_dir, "--time=1", "--signal=USR1@20")  # Slurm looks every 30 s: 10 to 40 s from now
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=90) == "COMPLETED"
    assert record(job_dir)[:4] == [f"saved {task}" for task in range(4)]


def test_one_rank_that_fails_ends_the_job(cluster: Cluster, job_dir: Path) -> None:
    python = job_dir / "python"
    python.write_text(RECORDER.replace("time.sleep", "task == '2' and sys.exit(7)\ntime.sleep"))
    job = submit(cluster, job_dir)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=30) == "FAILED"
    assert not [line for line in record(job_dir) if line.startswith("saved")]  # its peers were ended, not left to their own end


def test_the_job_script_finds_the_python_of_its_own_checkout(cluster: Cluster, job_dir: Path) -> None:
    checkout = job_dir / "some where" / "checkout"
    (checkout / "examples" / "slurm").mkdir(parents=True)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(SBATCH, checkout / "examples" / "slurm" / "train.sbatch")
    shutil.copy(job_dir / "python", checkout / ".venv" / "bin" / "python")
    script = str(checkout / "examples" / "slurm" / "train.sbatch")
    job = cluster.call("sbatch", "--parsable", f"--export=ALL,RECORD={job_dir / 'record'}", *SMALL, script, "run.yaml", cwd=job_dir).strip()
    wait_for_lines(job_dir, 4)
    cluster.call("scancel", job)


def test_the_job_script_says_what_it_needs(cluster: Cluster, job_dir: Path) -> None:
    job = submit(cluster, job_dir, arguments=())
    cluster.wait_for_state(job, "FAILED", timeout_s=30)
    assert "usage: sbatch" in (job_dir / f"rpp-{job}.out").read_text()


def wait_for_lines(job_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(record(job_dir)) < count:
        output = [path.read_text() for path in job_dir.glob("rpp-*.out")]
        assert time.monotonic() < deadline, f"{record(job_dir)} {output}"
        time.sleep(0.2)
