"""The watch and the end of a rank, with real processes that hang in every way that can be made without torch."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_rpp import launch, signals
from megatron_rpp.dist import activity, leaving, watch
from megatron_rpp.errors import DataError, DeadlineError

ROOT = Path(__file__).parents[3]
RANK = str(Path(__file__).with_name("watched_rank.py"))


def run(behavior: str, notes: Path, *, deadline_s: float = 1.0) -> tuple[int, str, str, float]:
    """Run one rank to its end: exit code, output, standard error, seconds."""
    start = time.monotonic()
    env = {**os.environ, "NOTES": str(notes), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, RANK, behavior, str(deadline_s)], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


def test_a_call_that_does_not_return_at_the_limit_of_its_wait_ends_the_rank(tmp_path: Path) -> None:
    code, _, errors, took_s = run("wait_does_not_return", tmp_path)
    assert code == DeadlineError.exit_code
    assert "rpp train: wait 'claim a prompt': rank 0 is stuck: the wait did not end at its limit of 1 s" in errors
    assert took_s < 15.0


def test_work_may_take_longer_than_the_deadline(tmp_path: Path) -> None:
    code, _, errors, took_s = run("work_takes_long", tmp_path, deadline_s=0.5)
    assert (code, errors) == (0, "")
    assert took_s > 2.0


def test_a_main_thread_that_the_kernel_holds_ends_its_rank(tmp_path: Path) -> None:
    """Its errors go to a file: the child that holds it lives longer, and would hold a pipe open."""
    env = {**os.environ, "NOTES": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "errors", "wb") as errors, subprocess.Popen([sys.executable, RANK, "held_by_the_kernel", "1"], env=env, stderr=errors) as rank:
        try:
            assert rank.wait(20) == DeadlineError.exit_code
        finally:
            rank.kill()
            os.close(os.open(tmp_path / "pipe", os.O_RDWR))  # the child's open returns
    said = (tmp_path / "errors").read_text()
    assert said.startswith("rpp train: save for 1 s: ")
    assert "the main thread has been stuck in one system call for 1 s" in said
    assert "state D (uninterruptible) in " in said


def test_a_rank_whose_close_hangs_after_its_report_leaves_and_tidies_up(tmp_path: Path) -> None:
    code, _, errors, took_s = run("close_hangs", tmp_path)
    assert (code, errors) == (1, "rpp train: the engine died\n")
    assert (tmp_path / "tidied-0").exists()
    assert 1.0 < took_s < 15.0  # the time to unwind, as the rank sets it


@pytest.mark.parametrize("has_report", [False, True])
def test_a_rank_whose_error_cannot_be_told_ends_all_the_same(tmp_path: Path, has_report: bool) -> None:
    """Standard error is on a full disk, or the report is."""
    words = [] if not has_report else ["--report", str(tmp_path / "reports" / "rank-0.json")]
    if has_report:
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / "rank-0.partial").mkdir()  # writing to it fails, whoever writes
    env = {**os.environ, "NOTES": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, RANK, "report_fails", "5", *words]
    with open("/dev/full" if not has_report else tmp_path / "errors", "wb") as errors:
        done = subprocess.run(line, env=env, stderr=errors, timeout=30, check=False)
    assert done.returncode == 1
    if has_report:
        assert (tmp_path / "errors").read_text() == "the engine died\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_to_stop_does_not_interrupt_the_closing(tmp_path: Path, number: signal.Signals) -> None:
    env = {**os.environ, "NOTES": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, RANK, "stopped_twice", "30"], env=env, stderr=subprocess.DEVNULL) as process:
        try:
            await_file(tmp_path / "ready-0")
            process.send_signal(number)
            await_file(tmp_path / "closing-0")
            process.send_signal(number)
            assert process.wait(20.0) == 128 + number
        finally:
            process.kill()
    assert (tmp_path / "closed-0").exists()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in signals.stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in signals.stop_signals()


def test_a_tidy_up_that_hangs_is_left_behind_and_the_others_are_made(tmp_path: Path) -> None:
    code, _, _, took_s = run("tidy_up_hangs", tmp_path)
    assert code == 0
    assert (tmp_path / "tidied-0").exists()
    assert took_s < 15.0


def test_a_rank_that_is_done_leaves_whatever_its_threads_do(tmp_path: Path) -> None:
    code, output, errors, took_s = run("threads_are_left", tmp_path)
    assert (code, output, errors) == (0, "done\n", "")
    assert took_s < 15.0
    assert (tmp_path / "hook-0").exists()


def test_a_signal_to_a_forked_child_does_not_end_the_rank(tmp_path: Path) -> None:
    code, _, errors, _ = run("forked_child_is_ended", tmp_path)
    assert (code, errors) == (0, "")


def test_an_error_that_comes_after_the_work_is_done_is_still_an_error(tmp_path: Path) -> None:
    code, _, errors, _ = run("error_after_the_end", tmp_path)
    assert (code, errors) == (1, "rpp train: the records cannot be closed\n")


def test_a_main_thread_that_does_not_act_on_a_signal_is_ended_by_its_watch(tmp_path: Path) -> None:
    env = {**os.environ, "NOTES": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, RANK, "blocked", "30"], env=env) as process:
        try:
            await_file(tmp_path / "ready-0")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20.0) == 143
        finally:
            process.kill()


def await_file(path: Path) -> None:
    limit = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < limit, f"no {path.name}"
        time.sleep(0.02)


def test_a_rank_that_is_stopped_while_it_starts_is_named_by_the_launcher(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer waits for it, and does not act on SIGTERM: both are gone soon after."""
    monkeypatch.setattr(launch, "START_SILENCE_S", 4.0)
    monkeypatch.setenv("NOTES", str(tmp_path))
    stopped: list[float] = []

    def stop() -> None:
        await_file(tmp_path / "ready-1")
        time.sleep(1.0)  # a few beats
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGSTOP)
        stopped.append(time.monotonic())

    thread = threading.Thread(target=stop)
    thread.start()
    command = [sys.executable, RANK, "blocked", "4.0"]
    assert launch.run_ranks(command, 2, log_dir=tmp_path / "logs", is_cpu=True, silence_s=4.0) == DeadlineError.exit_code
    assert time.monotonic() - stopped[0] < 20.0
    thread.join()
    errors = capfd.readouterr().err
    assert "launcher: rank 1 has been silent for" in errors
    assert "the last one said: update for" in errors
    assert "is in state stopped" in errors
    assert not [rank for rank in (0, 1) if is_running(int((tmp_path / f"pid-{rank}").read_text()))]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_launcher_ends_what_a_killed_rank_has_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child in a session of its own, stopped, so that it cannot look for its parent: as an engine."""
    monkeypatch.setenv("NOTES", str(tmp_path))
    command = [sys.executable, RANK, "killed_with_a_child", "30"]
    assert launch.run_ranks(command, 2, log_dir=tmp_path / "logs", is_cpu=True, silence_s=30.0) == 128 + signal.SIGKILL
    assert not is_running(int((tmp_path / "child").read_text()))


def test_a_beat_is_seen_even_if_its_text_cannot_be_written(tmp_path: Path) -> None:
    """As on a full disk: the limit on the size of files refuses the bytes."""
    path = tmp_path / "beat"
    assert watch.read_beat(path) is None
    file = watch.BeatFile(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        file.write(is_starting=False)
        first = watch.read_beat(path)
        time.sleep(0.05)
        file.write(is_starting=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert watch.read_beat(path).written > first.written
    with activity.doing("update"):
        file.write(is_starting=False)
    beat = watch.read_beat(path)
    assert (beat.doing, beat.is_starting) == ("update", False)


def test_what_the_main_thread_does_is_named_from_the_outside_in() -> None:
    with activity.doing("training"), activity.doing("update"), activity.doing("update"):
        assert activity.current()[0] == "training / update"
        with activity.doing("wait 'x'", 0.0):
            assert activity.current()[0] == "training / update / wait 'x'"
            assert activity.overdue(0.0).name == "wait 'x'"
            assert activity.overdue(60.0) is None
    assert activity.overdue(0.0) is None
    assert activity.current()[0] == "after training"


def test_other_threads_do_not_speak_for_the_main_thread() -> None:
    seen: list[str] = []

    def work() -> None:
        with activity.doing("another thread's work"):
            seen.append(activity.current()[0])

    with activity.doing("sampling"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["sampling"]


def test_a_process_without_a_launcher_or_a_command_line_is_not_ended_by_an_error() -> None:
    """`rpp` as a library, and the tests of this suite."""
    assert leaving.tell(DataError("a bad row")) == 1
    assert not leaving.is_ending()
