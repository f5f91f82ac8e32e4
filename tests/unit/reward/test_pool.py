"""The reward pool against verifiers that hang, crash, eat memory and lie: a verdict for each, in order, and no process left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.pool import RewardPool

HOSTILE = "tests.unit.reward.hostile:obey"


def inputs(*responses: str) -> list[RewardInput]:
    return [RewardInput("", response, "") for response in responses]


def is_running(pid: int) -> bool:
    """True for a process that is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def children() -> set[str]:
    """Processes started by any thread of this one; a thread may end while we look."""
    found: set[str] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update((thread / "children").read_text().split())
    return found


@pytest.fixture(scope="module")
def pool():
    with RewardPool(HOSTILE, timeout_s=2.0, num_workers=1, failed_score=-1.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("act", "kind", "reason"),
    [
        ("spin", "timeout", "no score within 2 s; the verifier was killed"),
        ("sleep", "timeout", "no score within 2 s; the verifier was killed"),
        ("exit", "crash", "the verifier's process ended: exit code 42"),
        ("segfault", "crash", "the verifier's process ended: killed by SIGSEGV"),
        ("memory", "memory", "the verifier ran out of its memory allowance"),
        ("raise", "exception", "ValueError: no verdict today"),
        ("raise unprintable", "exception", "_UnprintableError"),
        ("sys.exit", "exception", "SystemExit: 3"),
        ("recurse", "exception", "RecursionError: maximum recursion depth exceeded"),
        ("nan", "bad value", "the reward returned nan, expected a finite number"),
        ("text", "exception", "ValueError: could not convert string to float: 'high'"),
        ("nothing", "exception", "TypeError: float() argument must be a string or a real number, not 'NoneType'"),
    ],
)
def test_a_misbehaving_verifier_gives_a_failed_verdict_and_the_next_one_scores(pool: RewardPool, act: str, kind: str, reason: str) -> None:
    before, failed, after = pool.score_many(inputs("1", act, "2"))
    assert (before, after) == (Verdict(1.0), Verdict(2.0))
    assert (failed.score, failed.reward_failed) == (-1.0, kind)
    assert failed.reason.startswith(reason)


def test_expressions_that_no_computer_finishes_cost_their_limit_and_no_more() -> None:
    endless = [
        RewardInput("", rf"\boxed{{{power}}}", "2") for power in (r"\binom{2000000000}{1000000000}", r"\binom{3000000000}{1500000000}")
    ]
    with RewardPool("math", timeout_s=2.0, num_workers=2) as pool:
        begin = time.monotonic()
        verdicts = pool.score_many([*endless, RewardInput("", r"\boxed{\frac{4}{2}}", "2")])
        assert time.monotonic() - begin < 20
    assert [verdict.reward_failed for verdict in verdicts[:2]] == ["timeout", "timeout"]
    assert verdicts[2].score == 1.0


def test_verdicts_come_in_the_order_of_the_responses_though_some_take_longer() -> None:
    with RewardPool(HOSTILE, timeout_s=0.3, num_workers=3) as pool:
        verdicts = pool.score_many(inputs("0", "sleep", "2", "exit", *map(str, range(4, 40))))
    assert [verdict.reward_failed for verdict in verdicts[:4]] == [None, "timeout", None, "crash"]
    assert [verdict.score for verdict in verdicts[4:]] == list(range(4, 40))


def test_submit_returns_at_once_and_a_slow_response_holds_only_its_own_worker() -> None:
    with RewardPool(HOSTILE, timeout_s=30.0, num_workers=2) as pool:
        begin = time.monotonic()
        slow = pool.submit(inputs("sleep")[0])
        quick = [pool.submit(item) for item in inputs("1", "2", "3")]
        assert [future.result(timeout=5).score for future in quick] == [1.0, 2.0, 3.0]
        assert time.monotonic() - begin < 5
        assert not slow.done()
    assert slow.result(timeout=0).reward_failed == "closed"


def test_the_reward_gets_prompt_response_answer_and_prompt_end_whatever_they_hold() -> None:
    long = "x" * 3_000_000
    cases = [
        RewardInput("a", "bb", "ccc", "\ud800<think>\n"),
        RewardInput("\x00\n", "\u2713\U0001f600", "\ud800"),
        RewardInput("", long, ""),
    ]
    with RewardPool("tests.unit.reward.hostile:echo_length", num_workers=1) as pool:
        assert [verdict.score for verdict in pool.score_many(cases)] == [9321.0, 122.0, 30_000_000.0]


def test_what_a_verifier_prints_does_not_reach_stdout() -> None:
    program = f"""
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.reward.base import RewardInput
with RewardPool({HOSTILE!r}, num_workers=1) as pool:
    print(pool.score_many([RewardInput("", "print", "")])[0].score)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=Path.cwd())
    assert done.stdout == "1.0\n"
    assert "noise" in done.stderr


def test_workers_load_neither_torch_nor_another_rewards_libraries() -> None:
    with RewardPool(HOSTILE, num_workers=1) as pool:
        assert pool.score_many(inputs("torch"))[0] == Verdict(0.0)


def test_close_leaves_no_process_and_answers_what_is_queued() -> None:
    before = children()
    pool = RewardPool(HOSTILE, timeout_s=60.0, num_workers=2)
    pids = [int(verdict.score) for verdict in pool.score_many(inputs(*["pid"] * 20))]
    futures = [pool.submit(item) for item in inputs(*["sleep"] * 8)]
    begin = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - begin < 5
    assert [future.result(timeout=0).reward_failed for future in futures] == ["closed"] * 8
    assert not any(is_running(pid) for pid in pids)
    assert children() == before
    with pytest.raises(RewardError, match="this reward pool is closed"):
        pool.submit(inputs("1")[0])


def test_a_killed_verifier_takes_its_own_children_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPP_TEST_PID_FILE", str(tmp_path / "pid"))
    with RewardPool(HOSTILE, timeout_s=1.0, num_workers=1) as pool:
        assert pool.score_many(inputs("spawn"))[0].reward_failed == "timeout"
    assert wait_until_gone(int((tmp_path / "pid").read_text()))


def test_workers_die_with_a_parent_that_is_killed() -> None:
    """Even in the middle of a call, when no worker would notice a closed socket."""
    program = f"""
import time
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.reward.base import RewardInput
pool = RewardPool({HOSTILE!r}, timeout_s=600.0, num_workers=1)
print(int(pool.score_many([RewardInput("", "pid", "")])[0].score), flush=True)
pool.submit(RewardInput("", "spin", ""))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=5)
    assert wait_until_gone(worker)


def test_a_worker_killed_from_outside_costs_one_verdict_at_most() -> None:
    with RewardPool(HOSTILE, num_workers=1) as pool:
        os.kill(int(pool.score_many(inputs("pid"))[0].score), signal.SIGKILL)
        verdicts = pool.score_many(inputs("1", "2"))
    assert verdicts[0] in (Verdict(1.0), Verdict(0.0, "crash", "the verifier's process ended: killed by SIGKILL"))
    assert verdicts[1] == Verdict(2.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aritmetic", "unknown reward 'aritmetic'[\\s\\S]*did you mean 'arithmetic'"),
        ("no_such_package.rewards:score", "does not import[\\s\\S]*No module named 'no_such_package'"),
        ("tests.unit.reward.hostile:obye", "no function 'obye'[\\s\\S]*did you mean tests.unit.reward.hostile:obey"),
        ("tests.unit.reward.hostile:NOT_A_FUNCTION", "no function 'NOT_A_FUNCTION'"),
        ("tests.unit.reward.broken:score", "does not import[\\s\\S]*RuntimeError: broken on import"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_an_error_when_the_pool_opens(name: str, message: str) -> None:
    before = children()
    with pytest.raises(RewardError, match=message):
        RewardPool(name, num_workers=2)
    assert children() == before


def test_a_reward_that_never_finishes_loading_is_an_error_too() -> None:
    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"did not load within 0.5 s"):
        RewardPool("tests.unit.reward.slow_import:score", num_workers=2, start_timeout_s=0.5)
    assert time.monotonic() - begin < 10
