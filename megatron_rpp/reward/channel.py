"""Messages between a reward pool and its verifier processes: JSON values over a stream socket, with a deadline."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import time

_HEADER = struct.Struct(">I")  # length in bytes of the JSON that follows
_CREDENTIALS = struct.Struct("3i")  # pid, uid and gid of a sender, as the kernel writes them
_ANCILLARY_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)  # no room for file descriptors, so that none can be passed
_CHUNK = 1 << 16


class ChannelError(Exception):
    """What arrived is outside the protocol. The message says what it is."""


class Channel:
    """One end of a stream socket. deadline: a time.monotonic() value, or None to wait forever.

    max_bytes: the longest message that may arrive; None for any length.
    one_sender: every byte must come from the process that sent the first one. The kernel names the sender, so a copy of the
    socket in a forked process is of no use.

    Raises: EOFError when the peer is gone, TimeoutError past the deadline, ChannelError when what arrives is not one message
    in JSON, is too long, or comes from another process.
    """

    def __init__(self, connection: socket.socket, *, max_bytes: int | None = None, one_sender: bool = False) -> None:
        connection.setblocking(False)
        if one_sender:  # must be set before the peer can send
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._connection, self._max_bytes, self._one_sender = connection, max_bytes, one_sender
        self._sender: int | None = None
        self._received = bytearray()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT)

    def send(self, value: object, deadline: float | None = None) -> None:
        payload = json.dumps(value).encode("ascii")  # ASCII escapes carry even lone surrogates through
        left = memoryview(_HEADER.pack(len(payload)) + payload)
        while left:
            try:
                left = left[self._connection.send(left) :]
            except BlockingIOError:
                _wait(self._writable, deadline)
            except ConnectionError:
                raise EOFError from None

    def receive(self, deadline: float | None = None) -> object:
        """The next message. Nothing may follow it: each side waits for the other's."""
        self._receive_until(_HEADER.size, deadline)
        (length,) = _HEADER.unpack_from(self._received)
        if self._max_bytes is not None and length > self._max_bytes:
            raise ChannelError(f"a message of {length:,} bytes, longer than {self._max_bytes:,}")
        end = _HEADER.size + length
        self._receive_until(end, deadline)
        if len(self._received) > end:
            raise ChannelError(f"{len(self._received) - end:,} bytes after the end of a message")
        payload = bytes(self._received[_HEADER.size :])
        self._received.clear()
        try:
            return json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"a message that is not JSON: {error}") from None

    def is_quiet(self) -> bool:
        """Whether the peer is there and has sent nothing since the last message."""
        return not self._readable.poll(0)

    def _receive_until(self, count: int, deadline: float | None) -> None:
        while len(self._received) < count:
            _wait(self._readable, deadline)
            try:
                chunk, ancillary, _, _ = self._connection.recvmsg(_CHUNK, _ANCILLARY_BYTES)
            except BlockingIOError:  # nothing came in time, or another process was faster
                continue
            except ConnectionError:
                raise EOFError from None
            if not chunk:
                raise EOFError
            if self._one_sender:
                self._check_sender(ancillary)
            self._received += chunk

    def _check_sender(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        if not ancillary:
            raise ChannelError("a message without the credentials of its sender")
        sender = _CREDENTIALS.unpack(ancillary[0][2])[0]  # they come first, whatever else was sent along
        if self._sender is None:
            self._sender = sender
        if sender != self._sender:
            raise ChannelError(f"a message from process {sender} instead of {self._sender}")

    def shut(self) -> None:
        """End every wait at both ends, from any thread."""
        with contextlib.suppress(OSError):  # closed already
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()


def _wait(poll: select.poll, deadline: float | None) -> None:
    if deadline is None:
        poll.poll()
        return
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    poll.poll(left_s * 1000)
