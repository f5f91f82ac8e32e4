"""A rank for the launcher's tests: `rank.py BEHAVIOUR --report FILE`. It does what its behaviour's name says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_rpp.dist.leaving import write_report
from megatron_rpp.dist.world import World
from megatron_rpp.errors import EngineError
from megatron_rpp.signals import take_warning

behaviour, report = sys.argv[1], Path(sys.argv[sys.argv.index("--report") + 1])
world = World.from_env()
print(
    f"rank {world.rank} of {world.size} local {world.local_rank} of {world.local_size} on {world.num_nodes} by {world.launcher}", flush=True
)
if note := os.environ.get("NOTES"):
    (Path(note) / f"pid-{world.rank}").write_text(str(os.getpid()))


def fail(error: Exception, code: int) -> None:
    write_report(report, error)
    sys.exit(code)


def wait_for(path: Path) -> None:
    while not path.exists():
        if take_warning():
            (Path(os.environ["NOTES"]) / f"saved-{world.rank}").touch()
        time.sleep(0.01)


if behaviour == "first-error-counts":
    if world.rank == 1:
        fail(EngineError("the engine died", where="step 3", fix="look at its log"), 5)
    wait_for(report.with_name("rank-1.json"))
    fail(RuntimeError("connection closed by peer"), 1)
elif behaviour == "bug-on-rank-1" and world.rank == 1:
    try:
        {}["missing"]
    except KeyError as error:
        fail(error, 1)
elif behaviour == "rank-1-is-killed":
    if world.rank == 1:
        print("allocating all memory", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    fail(RuntimeError("connection closed by peer"), 1)
elif behaviour == "rank-0-fails-and-1-hangs":
    if world.rank == 0:
        fail(EngineError("the engine died"), 4)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
elif behaviour == "an-echo-comes-first":
    if world.rank == 1:
        echo = EngineError("start engines failed on rank 0: no memory")
        echo.origin = 0
        fail(echo, 1)
    wait_for(report.with_name("rank-1.json"))
    fail(EngineError("no memory"), 1)
elif behaviour == "rank-1-reports-and-stays":
    if world.rank == 1:
        write_report(report, EngineError("the engine died"))
    time.sleep(600)
elif behaviour == "wait":
    try:
        wait_for(Path(os.environ["NOTES"]) / "finish")
    except KeyboardInterrupt:  # as the command line does
        sys.exit(130)
elif behaviour == "threads":
    print(f"threads {os.environ.get('OMP_NUM_THREADS')}", flush=True)
