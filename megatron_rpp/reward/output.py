"""What verifiers print is shown on stderr line by line and escaped; they do not hold the terminal itself."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from megatron_rpp.display import printable

MAX_LINES = 1000  # of one process; the rest is read and dropped
_MAX_LINE_BYTES = 2000


@contextlib.contextmanager
def shown_escaped() -> Iterator[tuple[int, threading.Thread]]:
    """A descriptor for the stderr of a process that is started inside the block, and the thread that shows what comes.

    The thread ends when the process, and all that inherited the descriptor, have ended.
    """
    source, sink = os.pipe()
    thread = threading.Thread(target=_show, args=(source,), name="output of a verifier", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # this host starts no more threads
        os.close(source)
        os.close(sink)
        raise
    try:
        yield sink, thread
    finally:
        os.close(sink)


def _show(source: int) -> None:
    with open(source, "rb") as pipe:
        for number, line in enumerate(iter(lambda: pipe.readline(_MAX_LINE_BYTES), b"")):
            if number > MAX_LINES:
                continue  # a full pipe would block the verifier
            text = printable(line.decode(errors="replace").removesuffix("\n"))
            if number == MAX_LINES:
                text = f"{MAX_LINES} lines were shown; the others of this process are not"
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed; the pipe is drained all the same
                sys.stderr.write(f"verifier: {text}\n")
                sys.stderr.flush()
