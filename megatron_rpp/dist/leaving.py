"""How a rank ends: its first error is reported, what it started is ended, and the process exits, whatever its threads do.

A normal exit of the interpreter waits: for the threads of a gloo group that wait for a peer, for destructors, for exit hooks. A
rank therefore ends in `leave`, which runs the registered tidy-ups under a time limit and calls os._exit. An error is reported
by `tell` before anything is unwound, because unwinding can hang too. Then the watch (watch.py) gives the main thread
UNWIND_S to unwind its `with` blocks, and leaves in its place when it does not return.
The state below is that of the process: there is one end to it.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megatron_rpp.display import printable_lines
from megatron_rpp.errors import RppError

UNWIND_S = 5.0  # for the main thread, from its error to the end of its `with` blocks
FINISH_S = 30.0  # the same, when all has gone well
TIDY_S = 4.0  # for the tidy-ups of `leave`, all together


class _Ending:
    """What is known of the end of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tell: Callable[[BaseException], None] | None = None
        self.code: int | None = None  # set once the end has begun; 0 until an error comes
        self.limit = 0.0  # when the main thread must have left, on the monotonic clock
        self.tidy: list[Callable[[], object]] = []


_ending = _Ending()
_leaving = threading.Lock()  # taken once, never released


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with an error."""
    if isinstance(error, RppError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    if isinstance(error, BrokenPipeError):  # the reader of our output has left
        return 141
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def text_of(error: BaseException) -> str:
    """The message of an error that a user can act on; the traceback of any other."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, RppError) else "".join(traceback.format_exception(error)).rstrip()


def write_report(path: Path, error: BaseException) -> None:
    """Leave this rank's error for the launcher, in a file that appears whole."""
    partial = path.with_suffix(".partial")
    report = {"time": time.time(), "code": exit_code(error), "message": text_of(error), "origin": getattr(error, "origin", None)}
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(path)


def report_to(path: Path) -> None:
    """From here on `tell` writes the report that our own launcher reads."""
    _ending.tell = lambda error: write_report(path, error)


def print_errors(rank: int, command: str) -> None:
    """From here on `tell` prints to today's standard error, even if that is sent to a file later.

    Rank 0 prints every error whole. Other ranks print whole what they alone may know of. Of an error that all ranks share they
    print the first line.
    """
    terminal = os.dup(2)

    def tell(error: BaseException) -> None:
        if rank == 0:
            text = f"rpp {command}: {text_of(error)}" if isinstance(error, RppError | KeyboardInterrupt) else text_of(error)
        else:
            text = error.what if isinstance(error, RppError) and error.is_shared else text_of(error)
            text = text if text.startswith(f"rank {rank}, ") else f"rank {rank}: {text}"  # an error of its watch names it already
        os.write(terminal, f"{printable_lines(text, indent=0)}\n".encode(errors="backslashreplace"))

    _ending.tell = tell


def tell(error: BaseException) -> int:
    """Report an error, if it is the first one that ends this process; the exit code of the process.

    Does nothing in a process where neither `report_to` nor `print_errors` was called.
    """
    with _ending.lock:
        if not _ending.code and _ending.tell is not None:
            if not isinstance(error, SystemExit | BrokenPipeError):
                _tell_or_print(_ending.tell, error)
            _ending.code, _ending.limit = exit_code(error), time.monotonic() + UNWIND_S
        return exit_code(error) if _ending.code is None else _ending.code


def _tell_or_print(tell: Callable[[BaseException], None], error: BaseException) -> None:
    """A full disk or a closed terminal must not keep this process from ending: the error is then printed, if that is possible."""
    try:
        tell(error)
    except OSError:
        with suppress(OSError):
            os.write(2, f"{text_of(error)}\n".encode(errors="backslashreplace"))


def finish() -> None:
    """The work of this process is done and well: only its `with` blocks are left, for which it has FINISH_S."""
    with _ending.lock:
        if _ending.code is None and _ending.tell is not None:
            _ending.code, _ending.limit = 0, time.monotonic() + FINISH_S


def is_ending() -> bool:
    """Whether `tell` or `finish` was called."""
    return _ending.code is not None


def overdue_code() -> int | None:
    """The exit code, once the main thread has had its time to unwind and has not left."""
    is_late = _ending.code is not None and time.monotonic() > _ending.limit
    return _ending.code if is_late else None


@contextmanager
def tidied(call: Callable[[], object]) -> Iterator[None]:
    """`leave` calls `call` while the block is open. It must be safe to call from any thread."""
    _ending.tidy.append(call)
    try:
        yield
    finally:
        _ending.tidy.remove(call)


def leave(code: int) -> NoReturn:
    """End this process now: tidy up in at most TIDY_S, flush what was printed, exit. Returns never; a second caller waits.

    The last resort is a thread of C that needs no lock of Python's: it writes all stacks to standard error and exits with code 1.
    """
    if not _leaving.acquire(blocking=False):
        while True:
            time.sleep(1.0)
    with suppress(OSError, RuntimeError, ValueError, AttributeError):  # standard error is closed
        faulthandler.dump_traceback_later(TIDY_S + 5.0, exit=True, file=sys.__stderr__)
    limit = time.monotonic() + TIDY_S
    exit_hooks = atexit._run_exitfuncs  # what os._exit leaves out: other libraries' temporary folders and files
    for call in (*reversed(_ending.tidy), exit_hooks, _flush):
        worker = threading.Thread(target=call, name="tidy", daemon=True)
        worker.start()
        worker.join(max(0.2, limit - time.monotonic()))
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has left, or it is closed
            stream.flush()
