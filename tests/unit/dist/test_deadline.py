"""Named waits, with a store of this process only."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rpp.dist import activity, heartbeat
from megatron_rpp.dist.deadline import Deadline, as_lost_peer, deadline, watch_peers
from megatron_rpp.dist.heartbeat import Heartbeats
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


def _sighted(size: int) -> tuple[Heartbeats, dist.Store]:
    """Rank 0's heartbeats of a run, in a store of this process."""
    store = dist.HashStore()
    return Heartbeats(store, 0, size, deadline_s=4.0), dist.PrefixStore("heartbeat", store)


def test_the_error_of_a_wait_says_what_each_peer_was_last_seen_to_do() -> None:
    mine, store = _sighted(3)
    store.set("beat/1", json.dumps([7, 12.5, "sampling step 3"]))
    mine._read_beats()
    watch_peers(mine.describe)
    try:
        with pytest.raises(DeadlineError) as caught, deadline("update", 0.05, rank=0, peers=(1, 2)) as wait:
            wait.poll(lambda: False, every_s=0.01)
    finally:
        watch_peers(None)
    assert "last seen: rank 1: sampling step 3 for 12.5 s; rank 2: joining the run for 0.0 s" in str(caught.value)


def test_a_description_of_many_peers_names_those_that_are_longest_at_it() -> None:
    mine, store = _sighted(20)
    for rank in range(1, 20):
        store.set(f"beat/{rank}", json.dumps([1, float(rank), "update"]))
    mine._read_beats()
    text = mine.describe(tuple(range(1, 20)))
    assert text.startswith("rank 19: update for 19.0 s; rank 18:")
    assert text.endswith("; and 14 more")


def test_a_peer_whose_beat_does_not_change_is_silent_and_one_whose_beat_does_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    mine, store = _sighted(3)
    store.set("beat/2", json.dumps([1, 0.0, "sampling step 3"]))
    for number in range(12):
        clock[0] += 0.3
        store.set("beat/1", json.dumps([number, 0.0, "update"]))
        mine._read_beats()
        mine._answered = clock[0]
        error = mine.check()
        assert (error is None) == (0.3 * number <= 0.8 * 4.0), number
    assert error.what == "rank 2 has been silent for 3.3 s"
    assert error.got == "no heartbeat came; the last one said: sampling step 3 for 0.0 s"


def test_a_rank_that_was_stopped_itself_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    mine, _ = _sighted(2)
    mine._read_beats()
    clock[0] += 0.2
    assert mine.check() is None
    clock[0] += 60.0  # SIGSTOP, and SIGCONT a minute later
    assert mine.check() is None
    for _ in range(12):
        clock[0] += 0.3
        error = mine.check()
    assert error.what == "the store of the run has not answered for 3.6 s"  # as that of an agent of torchrun that is stopped


def test_a_host_of_the_store_that_is_gone_is_named_soon_but_not_at_the_end_of_a_run() -> None:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine = Heartbeats(dist.TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False), 1, 2, deadline_s=60.0)
    del host
    mine._run()  # returns: nobody answers
    assert mine.check() is None
    mine._answered -= heartbeat.LOST_S
    assert mine.check().what == "rank 0 is gone"
    mine.close()
    assert mine.check() is None


def test_a_collective_that_breaks_inside_megatron_is_a_lost_peer() -> None:
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4545\nlines of C++")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete")
    assert as_lost_peer(broken, 0).what == "rank 0 lost a peer in a collective"
    assert as_lost_peer(broken, 0).got == str(broken).splitlines()[0]
    assert as_lost_peer(late, 0).what == "rank 0 waited too long for a peer in a collective"
    assert as_lost_peer(RuntimeError("shapes do not match"), 0) is None
    assert as_lost_peer(KeyError("timeout"), 0) is None


def test_work_that_waits_for_peers_is_not_overdue_at_the_limit_of_one_wait() -> None:
    with deadline("optimiser step", 0.0, is_work=True):
        assert activity.overdue(0.0) is None
    with deadline("gather", 0.0):
        assert activity.overdue(0.0).name == "wait 'gather'"


def test_time_left_is_never_negative() -> None:
    spent = Deadline("spent", 0.0)
    assert spent.remaining_s == 0.0
    with pytest.raises(DeadlineError):
        spent.check()
