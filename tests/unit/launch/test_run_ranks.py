"""The launcher with real processes: places, one error message, and no process left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp import launch
from megatron_rpp.errors import ConfigError
from megatron_rpp.host import num_gpus

RANK = str(Path(__file__).with_name("rank.py"))
ROOT = Path(__file__).resolve().parents[3]

# A launcher of its own, for tests that send it signals.
LAUNCHER = """
import sys
from pathlib import Path
from megatron_rpp import launch
launch.GRACE_S = 2.0
sys.exit(launch.run_ranks([sys.executable, sys.argv[1], "wait"], 2, log_dir=Path(sys.argv[2]), is_cpu=True, silence_s=60.0))
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 2.0)


def run(behaviour: str, num_ranks: int, log_dir: Path) -> int:
    return launch.run_ranks([sys.executable, RANK, behaviour], num_ranks, log_dir=log_dir, is_cpu=True, silence_s=60.0)


def test_ranks_find_their_places_and_only_rank_0_prints_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("nothing", 3, tmp_path / "logs") == 0
    output = capfd.readouterr()
    assert output.out == "rank 0 of 3 local 0 of 3 on 1 by torchrun\n"
    assert output.err == ""
    for rank in (1, 2):
        assert (tmp_path / "logs" / f"rank-{rank}.log").read_text() == f"rank {rank} of 3 local {rank} of 3 on 1 by torchrun\n"


def test_the_error_that_came_first_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("first-error-counts", 3, tmp_path) == 5
    assert capfd.readouterr().err == (
        f"step 3: the engine died\n  fix: look at its log\n(rank 1 of 3; what the others printed is in {tmp_path})\n"
    )


def test_an_error_that_all_ranks_share_is_shown_as_the_rank_that_met_it_told_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("an-echo-comes-first", 2, tmp_path) == 1
    assert capfd.readouterr().err.startswith("no memory\n(rank 0 of 2")


def test_a_rank_that_reports_an_error_and_does_not_exit_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert run("rank-1-reports-and-stays", 2, tmp_path) == 1
    assert capfd.readouterr().err.startswith("the engine died\n(rank 1 of 2")
    assert time.monotonic() - start < 20


def test_a_defect_of_ours_is_shown_with_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("bug-on-rank-1", 2, tmp_path) == 1
    error = capfd.readouterr().err
    assert error.count("Traceback") == 1
    assert "KeyError: 'missing'\n(rank 1 of 2" in error


def test_a_killed_rank_is_blamed_not_the_peers_that_miss_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("rank-1-is-killed", 2, tmp_path) == 128 + signal.SIGKILL
    error = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL (often: out of memory); its last lines:" in error
    assert "  allocating all memory\n" in error
    assert "connection closed" not in error


def test_a_rank_that_hangs_after_anothers_failure_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTES", str(tmp_path))
    start = time.monotonic()
    assert run("rank-0-fails-and-1-hangs", 2, tmp_path / "logs") == 4
    assert time.monotonic() - start < 30  # grace, SIGTERM which it ignores, SIGKILL
    assert not any(is_running(pid) for pid in pids(tmp_path))
    assert capfd.readouterr().err.startswith("the engine died\n")


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("3", "3")])
def test_ranks_on_a_cpu_get_one_thread_each_unless_told(
    given: str | None, seen: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert run("threads", 1, tmp_path) == 0
    assert f"threads {seen}\n" in capfd.readouterr().out


@pytest.fixture
def launcher(tmp_path: Path):
    """A launcher process with two waiting ranks, and their process ids."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "NOTES": str(notes), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path / "logs")]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        eventually(lambda: len(pids(notes)) == 2, "two ranks")
        yield process, notes
    finally:
        process.kill()
        process.wait()


def pids(notes: Path) -> list[int]:
    return [int(text) for path in sorted(notes.glob("pid-*")) if (text := path.read_text())]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_stop_ends_all_ranks(launcher, number: signal.Signals, code: int) -> None:
    process, notes = launcher
    process.send_signal(number)
    assert process.wait(20) == code
    assert process.stderr.read() == f"stopped by {number.name}\n"
    assert not any(is_running(pid) for pid in pids(notes))


def test_no_rank_and_no_folder_outlives_a_launcher_that_was_killed(launcher) -> None:
    process, notes = launcher
    folders = list(notes.parent.glob("tmp/rpp-*"))
    assert len(folders) == 1
    process.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids(notes)), "end of the ranks")
    eventually(lambda: not folders[0].exists(), "end of the launcher's folder")


def test_the_signal_to_save_reaches_every_rank_and_ends_none(launcher) -> None:
    process, notes = launcher
    process.send_signal(signal.SIGUSR1)
    eventually(lambda: (notes / "saved-0").exists() and (notes / "saved-1").exists(), "saves")
    assert all(is_running(pid) for pid in pids(notes))
    (notes / "finish").touch()
    assert process.wait(20) == 0


def test_more_ranks_than_gpus_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few GPUs"):
        launch.run_ranks([sys.executable, RANK, "nothing"], num_gpus() + 1, log_dir=tmp_path / "logs", is_cpu=False, silence_s=60.0)
    assert not (tmp_path / "logs").exists()
