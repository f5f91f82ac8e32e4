"""Named waits, with a store of this process only."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rpp.dist.deadline import Deadline, Heartbeat, deadline
from megatron_rpp.errors import DeadlineError


def test_a_wait_that_ends_in_time_says_nothing() -> None:
    asked = iter([False, False, True])
    with deadline("quick", 5) as wait:
        wait.poll(lambda: next(asked), every_s=0.01)
        assert 0 < wait.remaining_s < 5


def test_a_poll_that_never_ends_is_an_error_with_the_waits_name() -> None:
    start = time.monotonic()
    with (
        pytest.raises(DeadlineError, match=r"wait 'engine start': rank 3 waited longer than 0.2 s(.|\n)*the engine to answer"),
        deadline("engine start", 0.2, rank=3, waiting_for="the engine to answer") as wait,
    ):
        wait.poll(lambda: False, every_s=0.01)
    assert time.monotonic() - start < 2


def test_a_key_that_nobody_writes_is_an_error_with_the_waits_name() -> None:
    """The other side of this store never comes: the store's own timeout becomes the wait's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DeadlineError, match="wait 'first weights'"), deadline("first weights", 0.3) as wait:
        store.wait(["weights/0"], timedelta(seconds=wait.remaining_s))


def test_a_lost_peer_is_not_called_a_slow_one() -> None:
    with pytest.raises(DeadlineError, match="rank 0 lost a peer it waited for") as caught, deadline("gather", 900, rank=0):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4545")
    assert "longer than" not in str(caught.value)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match") as caught, deadline("gather", 9):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, DeadlineError)
    with pytest.raises(KeyError), deadline("gather", 9):
        raise KeyError("timeout")


def test_the_error_says_where_each_peer_was_last_seen() -> None:
    store = dist.HashStore()
    Heartbeat(store, 1).beat("step 3: roll-out")
    mine = Heartbeat(store, 0)
    age, phase = mine.last(1)
    assert phase == "step 3: roll-out"
    assert 0 <= age < 60
    with (
        pytest.raises(DeadlineError, match=r"rank 1 in 'step 3: roll-out' \d+\.\d s ago; rank 2 never beat"),
        deadline("update", 0.05, rank=0, heartbeat=mine, peers=(1, 2)) as wait,
    ):
        wait.poll(lambda: False, every_s=0.01)


def test_time_left_is_never_negative() -> None:
    spent = Deadline("spent", 0.0)
    assert spent.remaining_s == 0.0
    with pytest.raises(DeadlineError):
        spent.check()
