"""The shared queue, on a real TCP store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_rpp.dist import store
from megatron_rpp.errors import EngineError
from megatron_rpp.rollout import queue as queue_module
from megatron_rpp.rollout.queue import WorkQueue


def _pair() -> tuple[WorkQueue, WorkQueue]:
    host = store.serve("127.0.0.1", 0, 10)
    other = store.connect("127.0.0.1", host.port, 10)
    return WorkQueue(host, leader=0, num_leaders=2), WorkQueue(other, leader=1, num_leaders=2)


def test_every_item_is_handed_out_once_in_every_round() -> None:
    queues = _pair()
    for num_items in (50, 0, 7):
        claimed: list[list[int]] = [[], []]

        def work(leader: int, claimed: list[list[int]] = claimed, num_items: int = num_items) -> None:
            queues[leader].open(num_items)
            while (item := queues[leader].claim()) is not None:
                claimed[leader].append(item)
                queues[leader].finish()
            queues[leader].wait()

        threads = [threading.Thread(target=work, args=(leader,)) for leader in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(claimed[0] + claimed[1]) == list(range(num_items))


def test_a_single_leader_needs_no_store() -> None:
    queue = WorkQueue()
    queue.open(2)
    assert [queue.claim(), queue.claim(), queue.claim()] == [0, 1, None]
    queue.finish()
    queue.finish()
    queue.wait()


def test_a_slow_leader_is_waited_for() -> None:
    patient, slow = _pair()
    for queue in (patient, slow):
        queue.open(1)
    slow.claim()
    done: list[float] = []

    def work() -> None:
        time.sleep(1.5)
        done.append(time.monotonic())
        slow.finish()

    thread = threading.Thread(target=work)
    thread.start()
    patient.wait()
    assert done and time.monotonic() >= done[0]
    thread.join(10)


def test_a_leader_that_gave_up_ends_the_wait_of_the_others_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "ASK_EVERY_S", 0.0)
    waiting, failing = _pair()
    for queue in (waiting, failing):
        queue.open(1)
    assert failing.claim() == 0
    failing.give_up("the engine's process ended")
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"another engine gave up(?s:.*)leader 1: the engine's process ended"):
        waiting.wait()
    assert time.monotonic() - start < 5


def test_a_store_whose_host_is_gone_is_an_error_in_seconds() -> None:
    program = """
import sys, time
from megatron_rpp.dist import store
host = store.serve("127.0.0.1", 0, 10)
print(host.port, flush=True)
time.sleep(100)
"""
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
    queue = WorkQueue(store.connect("127.0.0.1", int(host.stdout.readline()), 10), leader=1, num_leaders=2)
    queue.open(3)
    assert queue.claim() == 0
    host.send_signal(signal.SIGKILL)
    host.wait(10)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"leader 1, claim a prompt: the roll-out queue is lost"):
        queue.claim()
    assert time.monotonic() - start < 10
