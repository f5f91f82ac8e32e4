"""A rank for the tests of heartbeats: `silent_rank.py BEHAVIOR DEADLINE_S [--report FILE]`, with torchrun's variables.

It starts as a rank of a run does, joins the others on gloo, says that it is ready, and then does what its behavior's name says.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rpp import launch
from megatron_rpp.dist import leaving, watch
from megatron_rpp.dist.activity import doing
from megatron_rpp.dist.collectives import barrier, gather_objects
from megatron_rpp.dist.groups import UNBOUNDED
from megatron_rpp.dist.heartbeat import watching_peers
from megatron_rpp.dist.world import World

NOTES = Path(os.environ["NOTES"])
behavior, deadline_s = sys.argv[1], float(sys.argv[2])
report = Path(sys.argv[sys.argv.index("--report") + 1]) if "--report" in sys.argv else None
world = World.from_env()


def note(name: str) -> None:
    (NOTES / f"{name}-{world.rank}").write_text(str(os.getpid()))


def collective(host_group: dist.ProcessGroup) -> None:
    """Collectives without a pause, those of a training step: no named wait."""
    with doing("update"):
        for number in range(10**9):
            dist.all_reduce(torch.ones(1000))
            if number == 3:
                note("ready")


def roll_out(host_group: dist.ProcessGroup) -> None:
    """Rank 0 samples for a long time, the others wait for it in a named wait with a limit of an hour."""
    note("ready")
    if world.rank == 0:
        with doing("sampling step 3"):
            time.sleep(600)
    barrier(host_group, name="roll-out 3", deadline_s=3600.0)


def long_roll_out(host_group: dist.ProcessGroup) -> None:
    """As `roll_out`, but it ends well, after several times the deadline on silence."""
    with doing("sampling step 3"):
        time.sleep(3 * deadline_s if world.rank == 0 else 0)
    barrier(host_group, name="roll-out 3", deadline_s=60.0)
    note("finished")


def absent(host_group: dist.ProcessGroup) -> None:
    """Rank 1 is alive and does not come to a wait of the others in time."""
    note("ready")
    if world.rank == 1:
        with doing("save"):
            time.sleep(600)
    gather_objects("here", host_group, name="checkpoint files", deadline_s=4.0)


def run() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=deadline_s))
    host_group = dist.new_group(backend="gloo", timeout=UNBOUNDED)  # a run's host group waits for a year, too
    with watching_peers(world.rank, world.size, deadline_s=deadline_s):
        BEHAVIORS[behavior](host_group)
        barrier(host_group, name="the end of the run", deadline_s=60.0)
        leaving.finish()


BEHAVIORS = {each.__name__: each for each in (collective, roll_out, long_roll_out, absent)}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if report is not None:
    leaving.report_to(report)
else:
    leaving.print_errors(world.rank, "train")
watch.start(world.rank, deadline_s, None if report is None else launch.beat_file(report))
note("pid")
code = 0
try:
    run()
except BaseException as error:  # noqa: BLE001  as the command line does
    code = leaving.tell(error)
leaving.leave(code)
