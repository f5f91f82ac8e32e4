"""The reward pool against verifiers that fork, write to its socket, or leave programs behind.

No verdict may belong to another response, nothing may hang, and no process may outlive the pool.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rpp.errors import RewardError
from megatron_rpp.reward import verifier as verifier_module
from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.reward.verifier import Verifier
from tests.unit.reward.attacks import FORKS, frame
from tests.unit.reward.test_pool import children, is_running, wait_until_gone

ATTACKS = "tests.unit.reward.attacks:act"


def item(score: float, act: str = "work") -> RewardInput:
    return RewardInput(act, str(score), "")


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(ATTACKS, timeout_s=20.0, num_workers=1, failed_score=-1.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def hasty_pool() -> Iterator[RewardPool]:
    with RewardPool(ATTACKS, timeout_s=1.0, num_workers=1, failed_score=-1.0) as pool:
        yield pool


@pytest.mark.parametrize("how", FORKS)
def test_a_verifier_that_forks_and_returns_in_both_processes_mixes_up_no_verdicts(pool: RewardPool, how: str) -> None:
    items = [item(number, f"fork:{how}" if number % 5 == 0 else "work") for number in range(40)]
    assert pool.score_many(items) == [Verdict(float(number)) for number in range(40)]


@pytest.mark.parametrize("how", FORKS)
def test_a_forked_process_that_raises_ends_and_the_verifier_goes_on(pool: RewardPool, how: str) -> None:
    verdicts = pool.score_many([item(1, f"fork raises:{how}"), item(2), item(3)])
    assert verdicts == [Verdict(1.0), Verdict(2.0), Verdict(3.0)]


@pytest.mark.parametrize("how", ["libc fork", "clone"])
def test_an_answer_of_a_forked_process_is_refused_even_with_the_right_id(pool: RewardPool, how: str) -> None:
    refused, after = pool.score_many([item(1, f"child answers:{how}"), item(2)])
    assert (refused.score, refused.reward_failed) == (-1.0, "protocol")
    assert refused.reason.startswith("the pool received a message from process ")
    assert after == Verdict(2.0)


@pytest.mark.parametrize("how", ["libc fork", "clone"])
def test_a_forked_process_that_steals_requests_costs_failed_verdicts_only(hasty_pool: RewardPool, how: str) -> None:
    verdicts = hasty_pool.score_many([item(number, f"child reads:{how}" if number == 2 else "work") for number in range(8)])
    wrong = [verdict for number, verdict in enumerate(verdicts) if verdict.reward_failed is None and verdict.score != number]
    assert wrong == []
    assert sum(verdict.reward_failed is not None for verdict in verdicts) <= 2


def test_python_forks_and_programs_get_no_copy_of_the_socket(pool: RewardPool) -> None:
    assert pool.score_many([item(1, "no socket")]) == [Verdict(1.0)]


def test_the_usual_ways_to_run_code_work(pool: RewardPool) -> None:
    assert pool.score_many([item(1, "usual"), item(2, "exit code:0"), item(3, "exit code:7")]) == [Verdict(1.0), Verdict(2.0), Verdict(3.0)]


BYTES = {
    "a length of 4 GiB": struct.pack(">I", 2**32 - 1),
    "a length above the limit": struct.pack(">I", 70_000),
    "no JSON": frame(b"score"),
    "not UTF-8": frame(b'{"score": "\xff"}'),
    "nothing": frame(b""),
    "deep": frame(b"[" * 60_000),
    "an integer of 10,000 digits": frame(b'{"score": ' + b"9" * 10_000 + b"}"),
    "more than a message": frame(b"{}") + b"x",
}
ANSWERS = [
    *("{}", "[]", "null", "7", '"score"', '{"score": 1.0}', '{"failed": "memory", "reason": ""}', '{"id": null, "score": 1.0}'),
    *('{"id": "ID"}', '{"id": "ID", "score": "high"}', '{"id": "ID", "score": true}', '{"id": "ID", "score": 1}'),
    *('{"id": "ID", "score": NaN}', '{"id": "ID", "score": 1e999}', '{"id": "ID", "score": null}', '{"id": "ID", "score": [1.0]}'),
    *('{"id": "ID", "score": 1.0, "more": 1}', '{"id": "ID", "failed": "luck", "reason": ""}', '{"id": "ID", "failed": "memory"}'),
    *('{"id": "ID", "failed": "memory", "reason": 1}', '{"id": ["ID"], "score": 1.0}', '{"id": "id", "score": 1.0}'),
]


@pytest.mark.parametrize(
    "acts",
    [[f"bytes:{data.hex()}" for data in BYTES.values()], [f"answer:{answer}" for answer in ANSWERS]],
    ids=["bytes", "answers"],
)
def test_what_is_outside_the_protocol_is_a_failed_verdict_at_once(acts: list[str]) -> None:
    """Each verifier sleeps after it has written."""
    begin = time.monotonic()
    with RewardPool(ATTACKS, timeout_s=60.0, num_workers=2, failed_score=-1.0) as pool:
        verdicts = pool.score_many([one for act in acts for one in (item(1, act), item(2))])
    assert time.monotonic() - begin < 50
    assert verdicts[1::2] == [Verdict(2.0)] * len(acts)
    for act, refused in zip(acts, verdicts[::2], strict=True):
        assert (refused.score, refused.reward_failed) == (-1.0, "protocol"), act
        assert refused.reason.startswith("the pool received "), act
        assert refused.reason.endswith("; the verifier was killed"), act
        assert refused.reason.isprintable(), act


def test_an_answer_inside_the_protocol_counts_whoever_writes_it(hasty_pool: RewardPool) -> None:
    """The answers above are refused for what is wrong in them, and for nothing else."""
    assert hasty_pool.score_many([item(1, 'answer:{"id": "ID", "score": 5.0}')]) == [Verdict(5.0)]
    assert hasty_pool.score_many([item(1)])[0].reward_failed == "timeout"  # the verifier sleeps


def test_half_a_message_costs_the_time_limit(hasty_pool: RewardPool) -> None:
    verdicts = hasty_pool.score_many([item(1, "bytes:0000"), item(2, "bytes:000000087b"), item(3)])
    assert [verdict.reward_failed for verdict in verdicts] == ["timeout", "timeout", None]


def test_answers_that_are_written_in_advance_answer_nothing(pool: RewardPool) -> None:
    verdicts = pool.score_many([item(5, f"in advance:{'0' * 32}"), *map(item, range(6, 20))])
    assert verdicts[0].reward_failed == "protocol"
    assert verdicts[1:] == [Verdict(float(number)) for number in range(6, 20)]


def test_what_arrives_between_two_requests_costs_no_verdict(pool: RewardPool) -> None:
    assert pool.score_many([item(1, "write later")]) == [Verdict(1.0)]
    time.sleep(0.2)
    assert pool.score_many([item(2), item(3)]) == [Verdict(2.0), Verdict(3.0)]


def test_no_descriptor_can_be_passed_to_the_pool(hasty_pool: RewardPool) -> None:
    hasty_pool.score_many([item(1)])
    before = len(os.listdir("/proc/self/fd"))
    verdict, after = hasty_pool.score_many([item(1, "pass descriptor"), item(2)])
    assert (verdict.reward_failed, after) == ("timeout", Verdict(2.0))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_verifier_that_closes_the_socket_is_a_crash_at_once(pool: RewardPool) -> None:
    begin = time.monotonic()
    closed, after = pool.score_many([item(1, "close all"), item(2)])
    assert (closed.reward_failed, closed.reason, after) == ("crash", "the verifier's process ended: exit code 1", Verdict(2.0))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("how", FORKS)
def test_a_module_that_forks_while_it_is_imported_scores_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("RPP_TEST_IMPORT", how)
    with RewardPool("tests.unit.reward.importing:score", num_workers=1) as pool:
        assert pool.score_many(map(item, range(20))) == [Verdict(float(number)) for number in range(20)]


def test_a_module_that_writes_to_the_socket_while_it_is_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPP_TEST_IMPORT", "write")
    with pytest.raises(RewardError, match="it wrote to the socket of the pool while it loaded"):
        RewardPool("tests.unit.reward.importing:score", num_workers=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), RuntimeError("a fault of ours")])
def test_no_exception_ends_a_thread_of_the_pool(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    call = Verifier.call

    def faulty(self: Verifier, given: RewardInput, timeout_s: float) -> float:
        if given.response == "13":
            raise error
        return call(self, given, timeout_s)

    monkeypatch.setattr(Verifier, "call", faulty)
    with RewardPool(ATTACKS, num_workers=2, failed_score=-1.0) as pool:
        futures = [pool.submit(item(number % 14)) for number in range(56)]
        verdicts = [future.result(timeout=20) for future in futures]
        assert all(thread.is_alive() for thread in pool._threads)
    for number, verdict in enumerate(verdicts):
        if number % 14 != 13:
            assert verdict == Verdict(float(number % 14))
            continue
        assert (verdict.score, verdict.reward_failed) == (-1.0, "no worker")
        assert verdict.reason.startswith(f"the pool failed: {type(error).__name__}")


def test_a_host_without_room_for_a_verifier_is_an_error_at_the_start_and_a_failed_verdict_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with RewardPool(ATTACKS, num_workers=1) as pool:
        pool.score_many([item(1)])
        monkeypatch.setattr(verifier_module.subprocess, "Popen", refuse)
        lost, after = pool.score_many([item(1, "close all"), item(2)])
        assert (lost.reward_failed, after.reward_failed) == ("crash", "no worker")
        assert "a verifier process does not start" in after.reason
        monkeypatch.undo()
        assert pool.score_many([item(3)]) == [Verdict(3.0)]
    monkeypatch.setattr(verifier_module.subprocess, "Popen", refuse)
    with pytest.raises(RewardError, match=r"a verifier process does not start[\s\S]*lower reward.num_workers"):
        RewardPool(ATTACKS, num_workers=2)


def test_a_host_without_room_for_a_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before, start, started = children(), threading.Thread.start, []

    def limited(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RewardError, match=r"reward.num_workers: this host starts no more threads[\s\S]*lower reward.num_workers"):
        RewardPool(ATTACKS, num_workers=3)
    assert children() == before
    assert not any(thread.is_alive() for thread in started)


def pids_in(path: Path) -> list[int]:
    return list(map(int, path.read_text().split()))


@pytest.mark.parametrize("act", ["leave", "leave detached"])
def test_what_a_verifier_left_running_ends_with_the_pool(tmp_path: Path, act: str) -> None:
    with RewardPool(ATTACKS, num_workers=1) as pool:
        assert pool.score_many([item(1, f"{act}:{tmp_path}/pid"), item(2)]) == [Verdict(1.0), Verdict(2.0)]
        wait_for(lambda: (tmp_path / "pid").exists() and pids_in(tmp_path / "pid"))
        (left,) = pids_in(tmp_path / "pid")
        assert is_running(left)  # a verifier may keep a server for its later calls
    assert not is_running(left)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        ("leave and sleep", "timeout"),
        ("leave and crash", "crash"),
        ("leave detached and kill group", "crash"),
        ("leave and kill supervisor", "crash"),
        ("leave and interrupt supervisor", "crash"),
    ],
)
def test_what_a_verifier_started_ends_with_it(tmp_path: Path, act: str, kind: str) -> None:
    with RewardPool(ATTACKS, timeout_s=1.0, num_workers=1) as pool:
        failed, after = pool.score_many([item(1, f"{act}:{tmp_path}/pid"), item(2)])
        assert (failed.reward_failed, after) == (kind, Verdict(2.0))
        assert all(wait_until_gone(pid) for pid in pids_in(tmp_path / "pid"))


def test_a_supervisor_that_is_stopped_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_module, "SWEEP_S", 0.2)
    with RewardPool(ATTACKS, timeout_s=0.5, num_workers=1) as pool:
        pool.score_many([item(1)])
        os.kill(pool._verifiers[0]._process.pid, signal.SIGSTOP)
        failed, after = pool.score_many([item(1, f"leave and sleep:{tmp_path}/pid"), item(2)])
    assert (failed.reward_failed, after) == ("timeout", Verdict(2.0))
    assert all(wait_until_gone(pid) for pid in pids_in(tmp_path / "pid"))


def test_close_does_not_wait_for_a_call_whose_supervisor_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_module, "SWEEP_S", 0.2)
    monkeypatch.setattr(verifier_module, "_DYING_S", 0.2)
    pool = RewardPool(ATTACKS, timeout_s=60.0, num_workers=1)
    busy = pool.submit(item(1, f"leave and sleep:{tmp_path}/pid"))
    wait_for(lambda: (tmp_path / "pid").exists() and len(pids_in(tmp_path / "pid")) == 2)
    os.kill(pool._verifiers[0]._process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 30
    assert busy.result(timeout=0).reward_failed == "closed"
    assert all(wait_until_gone(pid) for pid in pids_in(tmp_path / "pid"))


@pytest.mark.parametrize("act", ["leave", "leave detached", "leave and sleep"])
def test_what_a_verifier_left_running_ends_when_the_process_of_the_pool_is_killed(tmp_path: Path, act: str) -> None:
    program = f"""
import time
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.reward.base import RewardInput
pool = RewardPool({ATTACKS!r}, timeout_s=600.0, num_workers=1)
pool.submit(RewardInput({act!r} + ":{tmp_path}/pid", "1", ""))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path.cwd())
    wait_for(lambda: (tmp_path / "pid").exists() and pids_in(tmp_path / "pid"))
    time.sleep(0.2)
    left = pids_in(tmp_path / "pid")
    assert all(map(is_running, left))
    parent.kill()
    parent.wait(timeout=5)
    assert all(wait_until_gone(pid) for pid in left)


def wait_for(is_done: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rpp_score_gives_every_row_its_own_verdict_while_verifiers_fork_and_write(tmp_path: Path) -> None:
    acts = {3: "fork:os.fork", 7: "answer:{}", 11: "fork:libc fork", 15: 'answer:{"id": "ID", "score": "high"}', 19: "in advance:0"}
    rows = [{"prompt": acts.get(number, "work"), "response": str(number), "answer": ""} for number in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "megatron_rpp", "score", "--reward", ATTACKS, "--input", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path.cwd())
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["line"] for row in found] == list(range(1, 61))
    failed = {row["line"] - 1: row["reward_failed"] for row in found if "reward_failed" in row}
    assert failed == {7: "protocol", 15: "protocol", 19: "protocol"}
    assert [row["score"] for row in found] == [0.0 if number in failed else float(number) for number in range(60)]
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0)
