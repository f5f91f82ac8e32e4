"""One verifier process as the pool sees it: started, asked, and ended with everything that it started."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from dataclasses import astuple
from pathlib import Path

from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import FailureKind, RewardInput
from megatron_rpp.reward.channel import Channel, ChannelError
from megatron_rpp.reward.output import shown_escaped
from megatron_rpp.reward.supervisor import SWEEP_S
from megatron_rpp.reward.worker import MAX_ANSWER_BYTES
from megatron_rpp.search_path import python_module, with_working_directory

MARK = "RPP_VERIFIER"  # an environment variable whose value all processes of one verifier inherit
_DYING_S = 5.0  # how long a verifier that has left its socket may take to end by itself
_SHOWN_S = 1.0  # for the last lines of a process that has ended
_FAILURES = ("memory", "exception", "bad value")


class CallError(Exception):
    """A call that gave no score. kind and reason: those of its Verdict."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Verifier:
    """One verifier process and the channel to it. One thread starts, calls and discards it; any thread may stop it."""

    def __init__(self, name: str, memory_bytes: int, start_timeout_s: float) -> None:
        self._name, self._memory_bytes, self._start_timeout_s = name, memory_bytes, start_timeout_s
        self._where = f"reward.name={name}"
        self._process: subprocess.Popen[bytes] | None = None  # the supervisor, parent of the verifier
        self._channel: Channel | None = None
        self._shown: threading.Thread | None = None  # shows what the process prints
        self._mark = ""
        self._stopped = False
        self._lock = threading.Lock()  # a pid is signaled only while it is unreaped, hence ours

    def start(self) -> None:
        """Have a process that is loaded and waits for a request; replace one that ended, or wrote unasked. Raises RewardError."""
        if self._process is not None and not self._channel.is_quiet():
            self.discard()
        if self._process is not None:
            return
        with self._lock:
            if self._stopped:
                raise RewardError("the reward pool is closing")
            try:
                self._spawn()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no more threads
                fix = "lower reward.num_workers if this host has no room for so many processes"
                raise RewardError("a verifier process does not start", where=self._where, got=error, fix=fix) from error
        try:
            self._load(time.monotonic() + self._start_timeout_s)
        except TimeoutError:
            self.discard()
            raise RewardError(f"it did not load within {self._start_timeout_s:g} s", where=self._where) from None
        except EOFError:
            raise RewardError("the process that loads it ended", where=self._where, got=self.discard(_DYING_S)) from None
        except ChannelError as error:
            self.discard()
            raise RewardError("it wrote to the socket of the pool while it loaded", where=self._where, got=error) from None
        except RewardError:
            self.discard()
            raise

    def _load(self, deadline: float) -> None:
        self._channel.receive(deadline)  # the verifier says that it runs; from here on the kernel checks that it is the sender
        request_id = secrets.token_hex(16)
        self._channel.send((request_id, self._name, self._memory_bytes), deadline)
        match self._channel.receive(deadline):
            case {"id": given, "loaded": _} if given == request_id:
                return
            case {"id": given, "error": str(text)} if given == request_id:
                raise RewardError(text)
        raise ChannelError("an answer to another request")

    def _spawn(self) -> None:
        # Not multiprocessing: its spawn imports the parent's __main__, and torch with it. One thread a verifier: they are
        # many, and the cores belong to the decoders.
        ours, theirs = socket.socketpair()
        try:
            channel = Channel(ours, max_bytes=MAX_ANSWER_BYTES, one_sender=True)
            mark, fd = secrets.token_hex(16), theirs.fileno()
            settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            settings |= {"PYTHONPATH": os.pathsep.join(with_working_directory()), MARK: mark}
            with shown_escaped() as (output, self._shown):
                self._process = subprocess.Popen(
                    [*python_module("megatron_rpp.reward.worker"), str(fd), str(os.getpid())],
                    env={**os.environ, **settings},
                    pass_fds=(fd,),
                    stdin=subprocess.DEVNULL,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel, self._mark = channel, mark

    def call(self, item: RewardInput, timeout_s: float) -> float:
        """One score. Raises CallError, after discarding a process that did not answer properly."""
        deadline = time.monotonic() + timeout_s
        request_id = secrets.token_hex(16)  # cannot be guessed, so no answer can be written before its request
        try:
            self._channel.send((request_id, *astuple(item)), deadline)
            return _score_in(self._channel.receive(deadline), request_id)
        except TimeoutError:
            self.discard()
            raise CallError("timeout", f"no score within {timeout_s:g} s; the verifier was killed") from None
        except EOFError:
            raise CallError("crash", f"the verifier's process ended: {self.discard(_DYING_S)}") from None
        except ChannelError as error:
            self.discard()
            raise CallError("protocol", f"the pool received {error}; the verifier was killed") from None
        except CallError as failure:
            if failure.kind == "memory":
                self.discard()  # what is left on its heap would fail the next response
            raise

    def stop(self) -> None:
        """End the process and let none follow. Its thread notices and reaps it."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _ask_to_end(self._process)
                self._channel.shut()

    def discard(self, grace_s: float = 0.0) -> str:
        """End the process and all that it started, and say how it ended. grace_s: how long it may take to end by itself."""
        process = self._process
        if process is None:
            return "no process"
        ended_by_itself = _await_zombie(process.pid, grace_s)
        is_swept = ended_by_itself
        if not ended_by_itself:
            _ask_to_end(process)
            is_swept = _await_zombie(process.pid, 2 * SWEEP_S)
        with self._lock:
            self._process = None
            self._channel.close()
            process.kill()  # if it is still there
            code = process.wait()
        if ended_by_itself or not is_swept:  # the supervisor may have been killed itself, or stopped
            _kill_marked(self._mark)
        self._shown.join(_SHOWN_S)
        if grace_s and not ended_by_itself:
            return "it closed the socket of the pool, and was killed"
        return f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"


def _score_in(answer: object, request_id: str) -> float:
    """The score. Raises CallError for an answer without one, ChannelError for what is not an answer to this request."""
    kind = type(answer).__name__
    if not isinstance(answer, dict) or "id" not in answer:
        raise ChannelError(f"a JSON {kind} without the id of a request")
    if answer.pop("id") != request_id:
        raise ChannelError("an answer to another request")
    match answer, len(answer):
        case {"score": float(score)}, 1 if math.isfinite(score):
            return score
        case {"failed": str(kind), "reason": str(reason)}, 2 if kind in _FAILURES:
            raise CallError(kind, reason)
    raise ChannelError("an answer with neither a score nor a failure")


def _ask_to_end(supervisor: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor.pid, signal.SIGTERM)


def _await_zombie(pid: int, limit_s: float) -> bool:
    """Wait for a process to end without reaping it, so that its number cannot be given to another meanwhile."""
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(ChildProcessError):  # something else in this program reaps every child
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
    return True


def _kill_marked(mark: str) -> None:
    """Kill the processes that inherited the mark. Those that cleared their environment are found by the supervisor alone."""
    wanted = f"{MARK}={mark}".encode()
    is_any_left = True
    deadline = time.monotonic() + SWEEP_S
    while is_any_left and time.monotonic() < deadline:
        is_any_left = False
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
                if wanted in variables:
                    os.kill(int(pid), signal.SIGKILL)
                is_any_left |= wanted in variables or _is_starting(pid, variables)
        time.sleep(0.002)


def _is_starting(pid: str, variables: list[bytes]) -> bool:
    """Whether a process is within exec: it has memory, and its variables cannot be read yet. One that has ended has neither."""
    return variables == [b""] and not Path(f"/proc/{pid}/statm").read_bytes().startswith(b"0 ")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
