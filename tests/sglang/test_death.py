"""Engines that do not start, die, or lose their owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from torch import nn

from megatron_rpp.errors import DeadlineError, EngineError
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.settings import EngineSettings
from tests.sglang import tiny
from tests.sglang.conftest import START_S


def _of_session(session: int) -> list[psutil.Process]:
    """Processes of one session that are not zombies."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def _listed(folder: Path) -> list[Path]:
    """What the processes of an engine have made in /dev/shm."""
    return [Path("/dev/shm") / name for name in (folder / "shared-memory.txt").read_text().split()]


def _wait_until_gone(session: int, limit_s: float) -> float:
    start = time.monotonic()
    while _of_session(session):
        assert time.monotonic() - start < limit_s, f"still there: {[process.cmdline() for process in _of_session(session)]}"
        time.sleep(0.1)
    return time.monotonic() - start


def test_a_start_past_its_deadline_says_what_it_was_doing_and_leaves_nothing(hf: Path, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"start of engine-0: not ready after 2 s, still (starting python|importing sglang)") as caught:
        Engine.start(EngineSettings(hf=str(hf)), log=tmp_path / "logs" / "e.log", deadline_s=2)
    assert time.monotonic() - start < 10
    assert "end of" in str(caught.value)
    assert "start_deadline_s" in str(caught.value)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_an_engine_that_is_stopped_while_it_starts_is_named(hf: Path, tmp_path: Path) -> None:
    with Engine.launch(EngineSettings(hf=str(hf)), log=tmp_path / "e.log", deadline_s=1.0) as engine:
        pid = engine._process.pid
        psutil.Process(pid).suspend()
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"start of engine-0, starting python: the engine's process has been stopped for") as caught:
            engine.await_ready(START_S)
        assert time.monotonic() - start < 10
        assert f"process {pid} is in state stopped" in str(caught.value)
        assert not _of_session(pid)


def test_a_model_that_cannot_be_read_is_an_engine_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(EngineError, match=r"engine-0: the engine's process ended(?s:.*)nonsense"):
        Engine.start(EngineSettings(hf=str(tmp_path)), log=tmp_path / "e.log", deadline_s=START_S)


def test_a_setting_that_sglang_does_not_know_is_an_engine_error_with_its_name(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no_such_option"):
        Engine.start(EngineSettings(hf=str(hf), sglang={"no_such_option": 1}), log=tmp_path / "e.log", deadline_s=START_S)


def test_a_failed_update_kills_the_engine_for_good(start_engine: Callable[..., Engine], model: nn.Module) -> None:
    engine = start_engine()
    tensors = tiny.state(model)
    with pytest.raises(EngineError, match=f"1 of {len(tensors)} tensors never came: {tensors[4][0]}"), engine.update(1) as load:
        load([entry for entry in tensors if entry[0] != tensors[4][0]])
    assert engine.version is None
    dead = "engine-0: the engine is dead: the update to version 1 failed"
    with pytest.raises(EngineError, match="an update is needed first"):
        engine.submit(tiny.requests(1), version=1)
    with pytest.raises(EngineError, match=dead):
        engine.score([[5, 6]])
    with pytest.raises(EngineError, match=dead), engine.update(1):
        pass
    session, listed = engine.info.pid, _listed(engine._process.folder)
    assert _of_session(session)
    engine.close()
    assert not _of_session(session)
    assert not engine._process.folder.exists()
    assert listed
    assert not [path for path in listed if path.exists()]


OWNER = """
import sys, time
from pathlib import Path
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.settings import EngineSettings
engine = Engine.start(EngineSettings(hf=sys.argv[1], max_concurrent=8), log=Path(sys.argv[2]), deadline_s=180, version=0)
print(engine.info.pid, engine._process.folder, *[report["pid"] for report in engine.info.reports], flush=True)
time.sleep(600)
"""


def test_no_process_of_an_engine_outlives_its_owner_by_ten_seconds(hf: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(hf), str(tmp_path / "e.log")], stdout=subprocess.PIPE, text=True)
    session, folder, *pids = owner.stdout.readline().split()
    assert {int(pid) for pid in pids} <= {process.pid for process in _of_session(int(session))}
    listed = _listed(Path(folder))
    owner.kill()
    owner.wait()
    assert _wait_until_gone(int(session), 10) < 10
    assert not [path for path in listed if path.exists()]
    assert not any(psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE for pid in pids)
    assert not Path(folder).exists()


def test_no_process_outlives_an_owner_that_is_killed_while_the_engine_starts_and_is_stopped(hf: Path, tmp_path: Path) -> None:
    """A stopped process has no thread that could look for its owner."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(hf), str(tmp_path / "e.log")], stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not (children := psutil.Process(owner.pid).children()):
        assert time.monotonic() < limit
        time.sleep(0.2)
    engine = Path(f"/proc/{children[0].pid}")
    while not any((task / "comm").read_text().startswith("ZMQ") for task in (engine / "task").iterdir()):
        assert time.monotonic() < limit
        time.sleep(0.1)
    time.sleep(1)  # it looks for its owner now, and imports SGLang
    children[0].suspend()
    owner.kill()
    owner.wait()
    _wait_until_gone(children[0].pid, 10)
