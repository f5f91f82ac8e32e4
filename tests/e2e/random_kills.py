"""Runs of which one process is killed with SIGKILL at a random time, and what they leave.

    python -m tests.e2e.random_kills ASSETS FOLDER [--kills 10] [--seed 0]

ASSETS: as examples/quickstart/make_assets.py writes it. Prints a row for each kill; the exit code is 1 if one left anything.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e import runs

MARK = "RPP_TEST_RUN"  # every process of a run inherits it
GONE_S = 25.0  # the launcher gives ranks 10 s to end by themselves
SETTLE_S = 5.0
OVERRIDES = ("run.steps=500", "eval.every=0", "checkpoint.every=0")
SURVIVED = ("reward worker", "resource tracker", "folder remover")  # the run goes on without them


@dataclass(frozen=True)
class Kill:
    """One kill and what the run left. after_s: from the start of the run. gone_s: from the kill to the end of the last process."""

    victim: str
    after_s: float
    gone_s: float
    processes: list[str]
    sockets: list[str]
    files: list[str]

    def __str__(self) -> str:
        left = [*self.processes, *self.sockets, *self.files]
        return f"{self.victim:17} after {self.after_s:5.1f} s, all gone after {self.gone_s:4.1f} s, left: {', '.join(left) or 'nothing'}"


def members(mark: str) -> list[psutil.Process]:
    """The processes of a run, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and (process.info["environ"] or {}).get(MARK) == mark:
            found.append(process)
    return found


def kind_of(process: psutil.Process, launcher: int) -> str:
    line = " ".join(process.cmdline())
    kinds = (
        ("rollout.server", "engine server"),
        ("reward.worker", "reward worker"),
        ("resource_tracker", "resource tracker"),
        ("shutil.rmtree", "folder remover"),
        ("sglang::", "scheduler"),
        ("multiprocessing.spawn", "scheduler"),
        ("--report", "rank"),
    )
    return "launcher" if process.pid == launcher else next((kind for text, kind in kinds if text in line), line[:40])


def shared_memory_of(temporary: Path) -> set[str]:
    """Names in /dev/shm that the run has listed so far."""
    return {name for path in temporary.glob("rpp-*/shared-memory.txt") for name in path.read_text().split()}


def kill_one(yaml: Path, folder: Path, choose: random.Random, *, latest_s: float) -> Kill:
    """Start a run in `folder`, kill one of its processes, and look at what is left once the others have had their time."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    mark = uuid.uuid4().hex
    env = {**runs.environment(), MARK: mark, "TMPDIR": str(temporary)}
    words = [sys.executable, "-m", "megatron_rpp", "train", str(yaml), f"run.dir={folder / 'run'}", *OVERRIDES]
    shared: set[str] = set()
    with open(folder / "out", "w") as out:
        launcher = subprocess.Popen(words, env=env, stdout=out, stderr=out)
    try:
        start, after_s = time.monotonic(), choose.uniform(0.5, latest_s)
        while time.monotonic() < start + after_s:
            shared |= shared_memory_of(temporary)
            time.sleep(0.1)
        there = sorted((kind_of(process, launcher.pid), process.pid) for process in members(mark))
        victim = choose.choice(sorted({kind for kind, _ in there}))
        os.kill(choose.choice([pid for kind, pid in there if kind == victim]), signal.SIGKILL)
        killed = time.monotonic()
        if victim in SURVIVED:
            time.sleep(SETTLE_S)
            shared |= shared_memory_of(temporary)
            launcher.send_signal(signal.SIGTERM)
        while members(mark) and time.monotonic() < killed + GONE_S + SETTLE_S:
            launcher.poll()
            time.sleep(0.1)
        gone_s = time.monotonic() - killed
        left = members(mark)
        sockets = [f"port {each.laddr.port}" for process in left for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
        files = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
        files += [name for name in sorted(shared) if (Path("/dev/shm") / name).exists()]
        return Kill(victim, after_s, gone_s, [kind_of(process, launcher.pid) for process in left], sockets, files)
    finally:
        launcher.kill()
        launcher.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latest-s", type=float, default=60.0, help="the latest time of a kill after the start of its run")
    options = parser.parse_args()
    yaml = options.folder / "run.yaml"
    options.folder.mkdir(parents=True, exist_ok=True)
    yaml.write_text(runs.YAML.format(assets=options.assets.absolute()))
    choose, is_clean = random.Random(options.seed), True
    for number in range(options.kills):
        kill = kill_one(yaml, options.folder / f"kill-{number}", choose, latest_s=options.latest_s)
        print(f"{number + 1:2}  {kill}", flush=True)
        is_clean &= not (kill.processes or kill.sockets or kill.files)
    return int(not is_clean)


if __name__ == "__main__":
    sys.exit(main())
