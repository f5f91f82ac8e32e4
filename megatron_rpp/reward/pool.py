"""Score responses in processes that can be killed.

Verifiers run code over whatever a model wrote: they hang, crash, leak and recurse. Here every call has a wall-clock
limit, and any failure is a Verdict with `reward_failed` set: scoring raises nothing and stalls nobody. Each worker process
has one thread that feeds it, so that `submit` returns at once and scoring overlaps decoding.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import astuple

from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import FailureKind, RewardInput, Verdict
from megatron_rpp.reward.channel import Channel
from megatron_rpp.reward.worker import MAX_REASON_CHARS


class RewardPool:
    """`num_workers` verifier processes behind one queue. Use as a context manager, or call `close`.

    timeout_s: wall clock of one call, counted from the moment a worker gets it; then the worker is killed and replaced.
    failed_score: the score of a Verdict whose verifier failed. memory_gib: address space of a call beyond the imports.

    Raises: RewardError from the constructor when the reward cannot be loaded in a worker.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float = 10.0,
        num_workers: int = 2,
        *,
        failed_score: float = 0.0,
        memory_gib: float = 4.0,
        start_timeout_s: float = 120.0,
    ) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"num_workers must be at least 1 and timeout_s positive, got {num_workers} and {timeout_s}")
        self._failed_score = failed_score
        self._timeout_s = timeout_s
        self._tasks: queue.SimpleQueue[tuple[RewardInput, Future[Verdict]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # makes "is it closed?" and "put" one act
        self._closed = False
        self._workers = [_Worker(name, int(memory_gib * 2**30), start_timeout_s) for _ in range(num_workers)]
        loaded: list[Future[None]] = [Future() for _ in self._workers]
        self._threads = [
            threading.Thread(target=self._serve, args=pair, name="reward", daemon=True) for pair in zip(self._workers, loaded, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for future in loaded:
                future.result()
        except BaseException:
            self.close()
            raise

    def submit(self, item: RewardInput) -> Future[Verdict]:
        """Queue one response. The future always gets a Verdict, never an exception."""
        future: Future[Verdict] = Future()
        future.set_running_or_notify_cancel()  # a running future cannot be cancelled under the thread that answers it
        with self._lock:
            if self._closed:
                raise RewardError("this reward pool is closed", fix="score before leaving the pool's `with` block")
            self._tasks.put((item, future))
        return future

    def score_many(self, items: Iterable[RewardInput]) -> list[Verdict]:
        """Verdicts in the order of the items."""
        return [future.result() for future in [self.submit(item) for item in items]]

    def close(self) -> None:
        """Kill the workers. Responses still queued get the verdict "closed". Safe to call twice."""
        with self._lock:
            self._closed = True
        for worker in self._workers:
            worker.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, worker: _Worker, loaded: Future[None]) -> None:
        """The life of one thread: start its worker, then answer the queue until close.

        The kernel ends a worker with the *thread* that spawned it, so this thread does all spawning and outlives them all.
        """
        try:
            worker.start()
            loaded.set_result(None)
        except RewardError as error:  # for the constructor to raise
            loaded.set_exception(error)
        while (task := self._tasks.get()) is not None:
            item, future = task
            future.set_result(self._judge(worker, item))
        worker.discard()

    def _judge(self, worker: _Worker, item: RewardInput) -> Verdict:
        try:
            worker.start()
            return Verdict(worker.call(item, self._timeout_s))
        except RewardError as error:
            kind, reason = "no worker", str(error)
        except _CallError as failure:
            kind, reason = failure.kind, failure.reason
        if self._closed:
            kind, reason = "closed", "the pool was closed before the response was scored"
        return Verdict(self._failed_score, kind, reason[:MAX_REASON_CHARS])


class _CallError(Exception):
    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class _Worker:
    """One verifier process and the channel to it. Its own thread starts, calls and discards it; any thread may stop it."""

    def __init__(self, name: str, memory_bytes: int, start_timeout_s: float) -> None:
        self._name, self._memory_bytes, self._start_timeout_s = name, memory_bytes, start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._stopped = False
        self._lock = threading.Lock()  # a pid is signalled only while it is unreaped, hence ours

    def start(self) -> None:
        """Spawn the process if there is none, and wait until the reward is loaded in it. Raises RewardError."""
        if self._process is not None:
            return
        with self._lock:
            if self._stopped:
                raise RewardError("the reward pool is closing")
            self._spawn()
        where = f"reward.name={self._name}"
        try:
            hello = self._channel.receive(time.monotonic() + self._start_timeout_s)
        except TimeoutError:
            self.discard()
            raise RewardError(f"it did not load within {self._start_timeout_s:g} s", where=where) from None
        except (EOFError, ValueError):
            raise RewardError("the process that loads it ended", where=where, got=self.discard(grace_s=1.0)) from None
        if "error" in hello:
            self.discard()
            raise RewardError(hello["error"])

    def _spawn(self) -> None:
        # Not multiprocessing: its spawn imports the parent's __main__, and torch with it. One thread a verifier: they are
        # many, and the cores belong to the decoders.
        ours, theirs = socket.socketpair()
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        fd = theirs.fileno()
        arguments = [str(fd), str(os.getpid()), str(self._memory_bytes), self._name]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rpp.reward.worker", *arguments],
                env={**os.environ, **one_thread, "PYTHONPATH": path},
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's to handle, and a kill reaches the verifier's own children
            )
        except OSError as error:
            ours.close()
            raise RewardError("a verifier process does not start", where=f"reward.name={self._name}", got=error) from error
        finally:
            theirs.close()
        self._channel = Channel(ours)

    def call(self, item: RewardInput, timeout_s: float) -> float:
        """One score. Raises _CallError, after discarding a process that did not answer properly."""
        deadline = time.monotonic() + timeout_s
        try:
            self._channel.send(astuple(item), deadline)
            answer = self._channel.receive(deadline)
        except TimeoutError:
            self.discard()
            raise _CallError("timeout", f"no score within {timeout_s:g} s; the verifier was killed") from None
        except (EOFError, ValueError):
            raise _CallError("crash", f"the verifier's process ended: {self.discard(grace_s=1.0)}") from None
        if "score" in answer:
            return answer["score"]
        if answer["failed"] == "memory":
            self.discard()  # what is left on its heap would fail the next response
        raise _CallError(answer["failed"], answer["reason"])

    def stop(self) -> None:
        """Kill the process and let none follow. Its thread notices and reaps it."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _kill(self._process)

    def discard(self, grace_s: float = 0.0) -> str:
        """Kill and reap the process, if there is one, and say how it ended; `grace_s` lets a dying one end by itself."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return "no process"
            _await_zombie(process.pid, grace_s)
            _kill(process)  # also what it left behind in its session
            code = process.wait()
            self._channel.close()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _await_zombie(pid: int, grace_s: float) -> None:
    """Wait for a process to end without reaping it, so that its number cannot be given to another meanwhile."""
    deadline = time.monotonic() + grace_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
