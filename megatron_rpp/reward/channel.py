"""Messages between a reward pool and its verifier processes: JSON values over a socket, with a deadline."""

from __future__ import annotations

import json
import socket
import struct
import time

_HEADER = struct.Struct(">I")  # length in bytes of the JSON that follows


class Channel:
    """One end of a stream socket. deadline: a time.monotonic() value, or None to wait for ever.

    Raises: EOFError when the peer is gone, TimeoutError past the deadline, ValueError when what arrives is not JSON.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, value: object, deadline: float | None = None) -> None:
        payload = json.dumps(value).encode("ascii")  # ASCII escapes carry even lone surrogates through
        self._set_time_left(deadline)
        try:
            self._connection.sendall(_HEADER.pack(len(payload)) + payload)
        except ConnectionError:
            raise EOFError from None

    def receive(self, deadline: float | None = None) -> object:
        (length,) = _HEADER.unpack(self._read(_HEADER.size, deadline))
        return json.loads(self._read(length, deadline))

    def _read(self, count: int, deadline: float | None) -> bytes:
        received = bytearray()
        while len(received) < count:
            self._set_time_left(deadline)
            try:
                chunk = self._connection.recv(min(count - len(received), 1 << 20))
            except ConnectionError:
                raise EOFError from None
            if not chunk:
                raise EOFError
            received += chunk
        return bytes(received)

    def _set_time_left(self, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)

    def close(self) -> None:
        self._connection.close()
