"""The roll-out ledger: what is on disk after a crash, and what is made of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.errors import CheckpointError
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.types import Response

NAME = "step-000003"


def _response(uid: str, sample: int, version: int = 3) -> Response:
    return Response(uid, sample, (5, 6, 1), (-0.1, -1.2345678901234567, -3.0e-7), "a \n b \u2028", "stop", version, None, None)


def test_responses_come_back_exactly(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    responses = [_response("a", 0), _response("a", 1), _response("b", 0)]
    ledger.append(NAME, responses[:2])
    ledger.append(NAME, responses[2:])
    assert Ledger(tmp_path).load(NAME) == {(each.prompt_uid, each.sample, 3): each for each in responses}


def test_each_leader_writes_its_own_file_and_reads_all(tmp_path: Path) -> None:
    Ledger(tmp_path, 0).append(NAME, [_response("a", 0)])
    Ledger(tmp_path, 1).append(NAME, [_response("b", 0)])
    Ledger(tmp_path, 1).append("step-000004", [_response("c", 0)])
    assert set(Ledger(tmp_path, 1).load(NAME)) == {("a", 0, 3), ("b", 0, 3)}


def test_a_response_of_another_version_is_another_entry(tmp_path: Path) -> None:
    Ledger(tmp_path).append(NAME, [_response("a", 0, 3), _response("a", 0, 4)])
    assert set(Ledger(tmp_path).load(NAME)) == {("a", 0, 3), ("a", 0, 4)}


@pytest.mark.parametrize("torn_bytes", [1, 10, 60])
def test_a_torn_last_line_is_not_read_and_the_next_response_is_not_glued_to_it(tmp_path: Path, torn_bytes: int) -> None:
    Ledger(tmp_path).append(NAME, [_response("a", 0), _response("b", 0)])
    path = next(tmp_path.glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-torn_bytes])
    assert set(Ledger(tmp_path).load(NAME)) == {("a", 0, 3)}
    Ledger(tmp_path).append(NAME, [_response("c", 0)])
    assert set(Ledger(tmp_path).load(NAME)) == {("a", 0, 3), ("c", 0, 3)}


def test_a_whole_line_that_is_no_response_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.leader-0.jsonl"
    path.write_text(json.dumps({"prompt_uid": "a"}) + "\n")
    with pytest.raises(CheckpointError, match=rf"{path.name}:1: a line of the ledger is not a response"):
        Ledger(tmp_path).load(NAME)


def test_what_was_appended_is_there_after_kill_9(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.types import Response
ledger = Ledger(Path({str(tmp_path)!r}))
ledger.append({NAME!r}, [Response("a", 0, (1,), (-1.0,), "x", "stop", 3)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False, timeout=60).returncode == -signal.SIGKILL
    assert set(Ledger(tmp_path).load(NAME)) == {("a", 0, 3)}
