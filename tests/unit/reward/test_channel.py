"""One message at a time over a socket: whole, in JSON, in time, and from one process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_rpp.config.ranges import MAX_SECONDS
from megatron_rpp.reward.channel import Channel, ChannelError

Pair = tuple[Channel, Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The pool's end, the verifier's end, and the socket under the latter."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, max_bytes=100, one_sender=True), Channel(theirs), theirs


def in_a_moment(act: object) -> None:
    threading.Timer(0.1, act).start()


def test_messages_of_any_size_arrive_whole(pair: Pair) -> None:
    pool, verifier, _ = pair
    long = ["x" * 3_000_000, "\ud800", None]
    sender = threading.Thread(target=pool.send, args=(long,))
    sender.start()
    assert verifier.receive() == long
    sender.join()
    verifier.send({"score": 1.0})
    assert pool.receive(time.monotonic() + 5) == {"score": 1.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x02{}x", "1 bytes after the end of a message"),
        (b"\0\0\0\x65", "a message of 101 bytes, longer than 100"),
        (b"\0\0\0\x02{]", "a message that is not JSON"),
        (b"\0\0\0\x02\xff\xff", "a message that is not JSON"),
    ],
)
def test_what_is_not_one_message_is_an_error_that_says_why(pair: Pair, data: bytes, message: str) -> None:
    pool, _, theirs = pair
    theirs.setblocking(True)
    theirs.sendall(data)
    with pytest.raises(ChannelError, match=message):
        pool.receive(time.monotonic() + 5)


def test_another_process_with_the_same_socket_is_found_out(pair: Pair) -> None:
    pool, verifier, theirs = pair
    verifier.send("mine")
    assert pool.receive(time.monotonic() + 5) == "mine"
    child = os.fork()
    if child == 0:
        theirs.send(b'\0\0\0\x06"mine"')
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ChannelError, match=f"a message from process {child} instead of {os.getpid()}"):
        pool.receive(time.monotonic() + 5)


def test_a_channel_is_quiet_until_something_arrives_or_the_peer_leaves(pair: Pair) -> None:
    pool, verifier, theirs = pair
    assert pool.is_quiet()
    verifier.send(1)
    assert not pool.is_quiet()
    pool.receive(time.monotonic() + 5)
    assert pool.is_quiet()
    theirs.close()
    assert not pool.is_quiet()
    with pytest.raises(EOFError):
        pool.receive(time.monotonic() + 5)


def test_a_deadline_passes_in_time_and_the_longest_one_does_not_overflow(pair: Pair) -> None:
    pool, verifier, _ = pair
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        pool.receive(begin + 0.1)
    with pytest.raises(TimeoutError):
        pool.send("x" * 3_000_000, time.monotonic() + 0.1)
    assert 0.2 <= time.monotonic() - begin < 5
    in_a_moment(lambda: verifier.send("late"))
    assert pool.receive(time.monotonic() + MAX_SECONDS) == "late"


def test_shut_ends_a_wait_in_another_thread(pair: Pair) -> None:
    pool, _, _ = pair
    in_a_moment(pool.shut)
    begin = time.monotonic()
    with pytest.raises(EOFError):
        pool.receive(begin + 60)
    assert time.monotonic() - begin < 10
    pool.close()
    pool.shut()
