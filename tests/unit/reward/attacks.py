"""Verifiers that fork, write to the pool's socket, or leave programs behind. `prompt` names the act, `response` is the score."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from megatron_rpp.reward.base import RewardInput

_LIBC = ctypes.CDLL(None)
_SYS_CLONE = 56  # x86-64
FORKS: dict[str, Callable[[], int]] = {
    "os.fork": os.fork,
    "libc fork": _LIBC.fork,  # runs none of Python's hooks
    "clone": lambda: _LIBC.syscall(_SYS_CLONE, int(signal.SIGCHLD), 0, 0, 0, 0),
}


def act(item: RewardInput) -> float:
    """Do what the prompt says: a word and its argument."""
    word, _, argument = item.prompt.partition(":")
    if word:
        _ACTS[word](argument)
    return float(item.response)


def sockets() -> list[int]:
    """Descriptors of the sockets of this process."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.append(fd)
        except OSError:
            continue  # the folder that listdir had open
    return found


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def request_id() -> str:
    """The id of the request that is being answered, out of the frames of the worker."""
    caller = sys._getframe()
    while "request_id" not in caller.f_locals:
        caller = caller.f_back
    return caller.f_locals["request_id"]


def _write(data: bytes) -> None:
    for fd in sockets():
        os.set_blocking(fd, True)
        os.write(fd, data)


def _write_and_wait(text: str) -> None:
    """Bytes in hex; ID stands for the request's id."""
    _write(bytes.fromhex(text.replace("ID", request_id().encode().hex())))
    time.sleep(600)


def _answer_and_wait(text: str) -> None:
    _write(frame(text.replace("ID", request_id()).encode()))
    time.sleep(600)


def _answers_in_advance(text: str) -> None:
    _write(frame(json.dumps({"id": text, "score": 1.0}).encode()) * 50)


def _write_later(text: str) -> None:
    threading.Timer(0.05, lambda: _write(b"late")).start()


def _work(text: str) -> None:
    time.sleep(0.005)


def _fork_and_return_in_both(how: str) -> None:
    if FORKS[how]() == 0:
        time.sleep(0.02)


def _fork_and_raise_in_child(how: str) -> None:
    if FORKS[how]() == 0:
        raise ValueError("only in the child")


def _child_answers(how: str) -> None:
    answer = frame(json.dumps({"id": request_id(), "score": 99.0}).encode())
    if FORKS[how]() == 0:
        _write(answer)
        os._exit(0)
    time.sleep(600)


def _child_reads(how: str) -> None:
    if FORKS[how]() == 0:
        for fd in sockets():
            os.set_blocking(fd, True)
            os.read(fd, 1 << 16)
        os._exit(0)


def _child_has_no_socket(how: str) -> None:
    before = len(sockets())
    child = os.fork()
    if child == 0:
        os._exit(len(sockets()))
    left = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    program = "import os; print(sum(os.path.realpath(f'/proc/self/fd/{fd}').count('socket') for fd in os.listdir('/proc/self/fd')))"
    executed = subprocess.run([sys.executable, "-c", program], close_fds=False, capture_output=True, text=True, check=True)
    assert (before, left, executed.stdout) == (1, 0, "0\n")


def _exit_code_of_child(text: str) -> None:
    child = os.fork()
    if child == 0:
        sys.exit(int(text))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == int(text), code


def _usual_ways_to_run_code(text: str) -> None:
    assert subprocess.run(["echo", "4"], capture_output=True, text=True, check=True).stdout == "4\n"
    assert os.system("exit 3") == 3 << 8
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(abs, -3).result() == 3


def _leave(pid_file: str, *, detached: bool) -> None:
    """A program in a session of its own. detached: the child of a child that has ended, with an empty environment."""
    if not detached:
        _note(pid_file, subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
        return
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            _note(pid_file, os.getpid())
            os.execve("/bin/sleep", ["sleep", "600"], {})
        os._exit(0)
    os.waitpid(child, 0)
    while not os.path.exists(pid_file) or not os.path.getsize(pid_file):
        time.sleep(0.01)


def _note(pid_file: str, pid: int) -> None:
    with open(pid_file, "a") as file:
        file.write(f"{pid}\n")


def _leave_and(end: Callable[[], object], *, detached: bool = False) -> Callable[[str], None]:
    def act(pid_file: str) -> None:
        _leave(pid_file, detached=detached)
        _note(pid_file, os.getpid())
        end()
        time.sleep(600)

    return act


def _pass_descriptor(text: str) -> None:
    for fd in sockets():
        socket.send_fds(socket.socket(fileno=os.dup(fd)), [b"x"], [0])
    time.sleep(600)


_ACTS: dict[str, Callable[[str], object]] = {
    "work": _work,
    "fork": _fork_and_return_in_both,
    "fork raises": _fork_and_raise_in_child,
    "child answers": _child_answers,
    "child reads": _child_reads,
    "no socket": _child_has_no_socket,
    "exit code": _exit_code_of_child,
    "usual": _usual_ways_to_run_code,
    "bytes": _write_and_wait,
    "answer": _answer_and_wait,
    "in advance": _answers_in_advance,
    "write later": _write_later,
    "pass descriptor": _pass_descriptor,
    "close all": lambda text: os.closerange(3, 256),
    "leave": lambda pid_file: _leave(pid_file, detached=False),
    "leave detached": lambda pid_file: _leave(pid_file, detached=True),
    "leave and sleep": _leave_and(lambda: None),
    "leave and kill supervisor": _leave_and(lambda: os.kill(os.getppid(), signal.SIGKILL)),
    "leave and interrupt supervisor": _leave_and(lambda: os.kill(os.getppid(), signal.SIGINT)),
    "leave detached and kill group": _leave_and(lambda: os.killpg(0, signal.SIGKILL), detached=True),
    "leave and crash": _leave_and(lambda: ctypes.string_at(0)),
}
