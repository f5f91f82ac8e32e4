"""Whatever process of a run is killed, nothing of the run is left. The whole count runs by hand: see random_kills.py."""

from __future__ import annotations

import random
from pathlib import Path

from tests.e2e.random_kills import kill_one


def test_a_run_of_which_one_process_is_killed_leaves_nothing(yaml: Path, tmp_path: Path) -> None:
    kill = kill_one(yaml, tmp_path / "killed", random.Random(3), latest_s=25.0)
    assert (kill.processes, kill.sockets, kill.files) == ([], [], []), kill
