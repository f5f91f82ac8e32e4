"""Score responses in processes that can be killed.

Verifiers run code over whatever a model wrote: they hang, crash, leak and recurse. Here every call has a wall-clock
limit, and any failure is a Verdict with `reward_failed` set: scoring raises nothing and stalls nobody. Each verifier process
has one thread that feeds it, so that `submit` returns at once and scoring overlaps decoding.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from megatron_rpp.config.ranges import check_range
from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.verifier import CallError, Verifier
from megatron_rpp.reward.worker import MAX_REASON_CHARS, describe


class RewardPool:
    """`num_workers` verifier processes behind one queue. Use as a context manager, or call `close`.

    timeout_s: wall clock of one call, counted from the moment a worker gets it; then the worker is killed and replaced.
    failed_score: the score of a Verdict whose verifier failed. memory_gib: address space of a call beyond the imports.

    Raises: from the constructor, RewardError when the reward cannot be loaded in a worker, ConfigError for a time or number
    out of range.
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
        check_range("reward.num_workers", num_workers)
        check_range("reward.timeout_s", timeout_s)
        check_range("start_timeout_s", start_timeout_s)
        self._failed_score = failed_score
        self._timeout_s = timeout_s
        self._tasks: queue.SimpleQueue[tuple[RewardInput, Future[Verdict]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # makes "is it closed?" and "put" one act
        self._closed = False
        self._verifiers = [Verifier(name, int(memory_gib * 2**30), start_timeout_s) for _ in range(num_workers)]
        self._threads: list[threading.Thread] = []
        try:
            for future in [self._start_thread(verifier) for verifier in self._verifiers]:
                future.result()
        except BaseException:
            self.close()
            raise

    def _start_thread(self, verifier: Verifier) -> Future[None]:
        """The future tells when the verifier is loaded."""
        loaded: Future[None] = Future()
        thread = threading.Thread(target=self._serve, args=(verifier, loaded), name="reward", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            fix = "lower reward.num_workers"
            raise RewardError("this host starts no more threads", where="reward.num_workers", got=error, fix=fix) from error
        self._threads.append(thread)
        return loaded

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
        for verifier in self._verifiers:
            verifier.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, verifier: Verifier, loaded: Future[None]) -> None:
        """The life of one thread: start its verifier, then answer the queue until close.

        The kernel ends a verifier with the *thread* that spawned it, so this thread does all spawning and outlives them all.
        """
        try:
            verifier.start()
        except BaseException as error:  # noqa: BLE001  the constructor raises it
            loaded.set_exception(error)
        else:
            loaded.set_result(None)
        while (task := self._tasks.get()) is not None:
            item, future = task
            future.set_result(self._judge(verifier, item))
        self._discard(verifier)

    def _judge(self, verifier: Verifier, item: RewardInput) -> Verdict:
        """A verdict, whatever happens: an exception here would end the thread, and nobody would answer what waits for it."""
        try:
            verifier.start()
            return Verdict(verifier.call(item, self._timeout_s))
        except CallError as failure:
            kind, reason = failure.kind, failure.reason
        except RewardError as error:
            kind, reason = "no worker", str(error)
        except BaseException as error:  # noqa: BLE001  see above
            kind, reason = "no worker", f"the pool failed: {describe(error)}"
            self._discard(verifier)
        if self._closed:
            kind, reason = "closed", "the pool was closed before the response was scored"
        return Verdict(self._failed_score, kind, reason[:MAX_REASON_CHARS])

    def _discard(self, verifier: Verifier) -> None:
        """End a verifier that may be in any state."""
        with contextlib.suppress(BaseException):
            verifier.discard()
