"""The process groups that a Megatron rank opens."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from megatron_rpp.dist.agreement import raise_together
from megatron_rpp.dist.collectives import gather_objects
from tests.dist.ranks import run_ranks
from tests.mcore import tiny

PEERS_S, LATE_S = 4.0, 7.0


def _wait_for_a_late_rank(rank: int, folder: Path) -> list[int]:
    cfg = tiny.make_config(folder, tp=2)
    with tiny.megatron(replace(cfg, run=replace(cfg.run, deadline_s=PEERS_S))) as groups:
        if rank == 1:
            time.sleep(LATE_S)
        raise_together(None, groups=groups, what="a long roll-out", deadline_s=60)
        return gather_objects(rank, groups.world_cpu, deadline_s=60)


def test_a_wait_with_a_deadline_of_its_own_outlasts_that_of_the_run(tmp_path: Path) -> None:
    """A rank without an engine waits for a roll-out for hours, whatever run.deadline_s says of a missing peer."""
    assert run_ranks(2, _wait_for_a_late_rank, tmp_path, init=False, timeout_s=90) == [[0, 1], [0, 1]]
