"""A process with a watch, without torch: `watched_rank.py BEHAVIOR DEADLINE_S [--report FILE]`.

It starts as the command line starts a rank, and then does what its behavior's name says. It writes notes into $NOTES.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_rpp import launch
from megatron_rpp.dist import leaving, watch
from megatron_rpp.dist.activity import doing
from megatron_rpp.errors import EngineError
from megatron_rpp.signals import unwind_once

NOTES = Path(os.environ["NOTES"])
LIBC = ctypes.CDLL(None)
behavior, deadline_s = sys.argv[1], float(sys.argv[2])
report = Path(sys.argv[sys.argv.index("--report") + 1]) if "--report" in sys.argv else None
leaving.UNWIND_S = leaving.TIDY_S = watch.STOP_S = 1.0  # instead of several seconds each
rank = int(os.environ.get("RANK", "0"))


def note(name: str) -> None:
    (NOTES / f"{name}-{rank}").write_text(str(os.getpid()))


def block() -> None:
    """As a wait in C++ on a condition: it lets other threads run, and no signal interrupts it. A mutex is taken twice."""
    mutex = ctypes.create_string_buffer(64)
    LIBC.pthread_mutex_lock(mutex)
    LIBC.pthread_mutex_lock(mutex)


def hold_in_kernel() -> None:
    """State D: vfork waits for a child that opens a pipe to which nobody writes."""
    pipe = NOTES / "pipe"
    os.mkfifo(pipe)
    actions = ctypes.create_string_buffer(1024)
    LIBC.posix_spawn_file_actions_init(actions)
    LIBC.posix_spawn_file_actions_addopen(actions, 0, str(pipe).encode(), os.O_RDONLY, 0)
    arguments = (ctypes.c_char_p * 2)(b"/bin/true", None)
    LIBC.posix_spawn(ctypes.byref(ctypes.c_int()), b"/bin/true", actions, None, arguments, arguments)


def run() -> None:
    if behavior == "blocked":
        with doing("update"):
            note("ready")
            block()
    elif behavior == "wait_does_not_return":
        with doing("wait 'claim a prompt'", 1.0):
            block()
    elif behavior == "work_takes_long":
        with doing("update"):
            time.sleep(4 * deadline_s)
    elif behavior == "held_by_the_kernel":
        with doing("save"):
            hold_in_kernel()
    elif behavior == "close_hangs":
        with leaving.tidied(lambda: note("tidied")):
            try:
                raise EngineError("the engine died")
            except EngineError as error:
                leaving.tell(error)  # as `heartbeat.reported` does, before anything is closed
                block()
    elif behavior == "report_fails":
        threading.Thread(target=block).start()
        raise EngineError("the engine died")
    elif behavior == "stopped_twice":
        try:
            with doing("sample"):
                note("ready")
                time.sleep(30.0)
        finally:
            note("closing")
            time.sleep(0.7)  # as the end of an engine
            note("closed")
    elif behavior == "tidy_up_hangs":
        with leaving.tidied(lambda: note("tidied")), leaving.tidied(block):
            leaving.leave(0)
    elif behavior == "forked_child_is_ended":
        child = os.fork()
        if child == 0:
            block()
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        time.sleep(2.0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    elif behavior == "error_after_the_end":
        leaving.finish()
        raise EngineError("the records cannot be closed")
    elif behavior == "killed_with_a_child" and rank == 1:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        os.kill(child.pid, signal.SIGSTOP)
        (NOTES / "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    elif behavior == "threads_are_left":
        atexit.register(note, "hook")
        threading.Thread(target=block).start()  # an ordinary exit of the interpreter waits for it
        print("done")


unwind_once()
if report is not None:
    leaving.report_to(report)
else:
    leaving.print_errors(rank, "train")
watch.start(rank, deadline_s, None if report is None else launch.beat_file(report))
note("pid")
code = 0
try:
    run()
except BaseException as error:  # noqa: BLE001  as the command line does
    code = leaving.tell(error)
leaving.leave(code)
