"""The client of one engine: starts its process, samples, scores, and brings it new weights.

One thread of the leader rank uses it. Every wait has a deadline, every reply is checked, and every response carries the
version of the weights that sampled it. An engine whose update failed halfway is dead for good: its weights are a mixture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq

from megatron_rpp.errors import DeadlineError, EngineError, StaleWeightsError
from megatron_rpp.rollout.memory import Bucket, Outbox
from megatron_rpp.rollout.process import EngineProcess
from megatron_rpp.rollout.request import Completion, EngineBeat, EngineInfo, Request
from megatron_rpp.rollout.settings import SOCKET_NAME, EngineSettings

Announced = Mapping[str, tuple[Sequence[int], int]]  # see Engine.update_shards
Packed = Mapping[str, Any]  # what the `pack` of an outbox returns

PAUSE_S = 2.0  # a longer gap between two looks means that this process did not run
POLL_S = 0.25  # how often a wait looks whether the process is still alive
REPLY_S = 60.0  # for requests that need no model
UPDATE_S = 600.0


class Engine:
    """A running engine. Made by `Engine.start`; `close` it, or use it in a `with`."""

    def __init__(self, settings: EngineSettings, log: Path, deadline_s: float = UPDATE_S) -> None:
        """deadline_s: longest wait for any answer of the running engine. Units: seconds."""
        self.settings, self.name, self._log, self._deadline_s = settings, settings.name, log, deadline_s
        self._launch()

    def _launch(self) -> None:
        """Start the process; everything that is known of an engine begins anew with it."""
        self.version: int | None = None
        self.info: EngineInfo | None = None
        self.in_flight: dict[str, Request] = {}
        self.beat: EngineBeat | None = None
        self._looked, self._paused_s = time.monotonic(), 0.0  # the last look at the engine; see _note_pause
        self._launched = self._progress = time.monotonic()  # _progress: when tokens were last known to come
        self._dead: str | None = None
        self._released: set[str] = set()
        self._ids = 0
        self._replies: dict[int, dict[str, Any]] = {}
        self._finished: list[Completion] = []
        self._outbox = Outbox()
        self._process = EngineProcess(self.settings, self._log)
        # The shared context: one of our own would wait for its sockets for ever when an engine is dropped without `close`.
        self._socket = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(f"ipc://{self._process.folder / SOCKET_NAME}")

    @classmethod
    def start(
        cls,
        settings: EngineSettings,
        *,
        log: Path,
        deadline_s: float,
        version: int | None = None,
        on_progress: Callable[[str], None] = lambda line: None,
    ) -> Engine:
        """`launch`, then `await_ready`."""
        engine = cls.launch(settings, log=log)
        engine.await_ready(deadline_s, version=version, on_progress=on_progress)
        return engine

    @classmethod
    def launch(cls, settings: EngineSettings, *, log: Path, deadline_s: float = UPDATE_S) -> Engine:
        """Start an engine's process and return while it loads; only `await_ready` and `close` may follow.

        deadline_s: longest wait for any answer of the running engine, and for a starting one that is stopped. Units: seconds.
        """
        return cls(settings, log, deadline_s)

    def await_ready(self, deadline_s: float, *, version: int | None = None, on_progress: Callable[[str], None] = lambda line: None) -> None:
        """Wait until the engine serves; the deadline counts from its launch. It is ended when it does not.

        version: what the caller calls the weights of the HF directory; with None nothing can be sampled before an update.
        on_progress: told what the start is at, in a line.
        Raises: DeadlineError, EngineError (with the end of the log), also when a process runs without its patches.
        """
        try:
            self._wait_until_ready(self._launched, deadline_s, on_progress)
            hello = self._call("hello", REPLY_S, version=version)
        except BaseException:
            self.close()
            raise
        self.version = version
        self.info = EngineInfo(self._process.pid, tuple(hello["reports"]), hello["is_seeded"], time.monotonic() - self._launched)
        on_progress(f"{self.name}: ready after {self.info.start_s:.1f} s, {len(self.info.reports)} processes")

    def restart(self, deadline_s: float, *, on_progress: Callable[[str], None] = lambda line: None) -> None:
        """End whatever is left of this engine and start it anew, as after `start`: it holds no version. Raises: as `await_ready`."""
        self.close()
        self._launch()
        self.await_ready(deadline_s, on_progress=on_progress)

    def _wait_until_ready(self, start: float, deadline_s: float, on_progress: Callable[[str], None]) -> None:
        phase = "starting python"
        while True:
            elapsed_s = time.monotonic() - start
            if elapsed_s > deadline_s:
                raise DeadlineError(
                    f"not ready after {deadline_s:g} s, still {phase}",
                    where=f"start of {self.name}",
                    expected="an engine that serves",
                    got=self._process.tail(),
                    fix="raise rollout.start_deadline_s if loading is really that slow",
                )
            message = self._receive(min(POLL_S, deadline_s))
            if message is None:
                self._check_not_stopped(phase)
                continue
            if message["event"] == "ready":
                return
            if message["event"] == "refused":
                raise EngineError(f"the engine refused to serve: {message['error']}", where=self.name, got=self._process.tail())
            phase = message["phase"]
            on_progress(f"{self.name}: {phase} ({elapsed_s:.1f} s)")

    def _check_not_stopped(self, phase: str) -> None:
        """A starting engine says little, for as long as it loads. But one that is stopped never goes on. Raises: DeadlineError."""
        stopped_s = self._process.stopped_s()
        if stopped_s > self._deadline_s:
            raise DeadlineError(
                f"the engine's process has been stopped for {stopped_s:.0f} s",
                where=f"start of {self.name}, {phase}",
                expected="a process that runs",
                got=f"process {self._process.pid} is {self._process.state}",
                fix="somebody sent it SIGSTOP, or a debugger holds it; start the run again",
            )

    def submit(self, requests: Sequence[Request], *, version: int) -> None:
        """Start sampling; the completions come out of `poll`.

        Raises: StaleWeightsError when the engine holds other weights than `version`; EngineError.
        """
        if version != self.version:
            raise StaleWeightsError(
                "the engine holds other weights",
                where=self.name,
                expected=f"version {version}",
                got="no version, an update is needed first" if self.version is None else f"version {self.version}",
                fix="publish the weights before generating",
            )
        if not self.in_flight:
            self._progress = time.monotonic()
        wire = [{"key": each.key, "tokens": list(each.tokens), "sampling": each.sampling.to_sglang(each.seed)} for each in requests]
        self.in_flight |= {request.key: request for request in requests}  # first: the answers may overtake the reply
        try:
            self._call("generate", REPLY_S, requests=wire, version=version)
        except EngineError:
            self.in_flight = {key: request for key, request in self.in_flight.items() if request not in requests}
            raise

    def poll(self, timeout_s: float) -> list[Completion]:
        """What has finished, waiting at most timeout_s for the first. Raises: EngineError when a request failed or the engine died."""
        limit = time.monotonic() + timeout_s
        self._check_alive()
        while not self._finished and (remaining_s := limit - time.monotonic()) > 0:
            self._dispatch(self._receive(min(POLL_S, remaining_s)))
        while self._socket.poll(0):
            self._dispatch(self._receive(0))
        finished, self._finished = self._finished, []
        return finished

    def generate(self, requests: Sequence[Request], *, version: int, quiet_deadline_s: float) -> Iterator[Completion]:
        """Sample all requests, yielding each completion as soon as it is there.

        quiet_deadline_s: longest time without any sign of progress.
        """
        self.submit(requests, version=version)
        waiting = {request.key for request in requests}
        while waiting:
            for completion in self.poll(POLL_S):
                waiting.discard(completion.key)
                yield completion
            if self.quiet_s > quiet_deadline_s:
                raise self.stalled("generate", quiet_deadline_s)

    @property
    def quiet_s(self) -> float:
        """Seconds without a sign of progress; 0 when nothing is in flight."""
        return time.monotonic() - self._progress if self.in_flight else 0.0

    def stalled(self, where: str, limit_s: float) -> DeadlineError:
        """The error of a wait that saw no progress: engine, requests in flight, last sign of life."""
        keys = sorted(self.in_flight)
        named = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        return DeadlineError(
            f"{self.name} made no progress for {limit_s:g} s",
            where=where,
            expected=f"responses to {named}",
            got=f"process {self._process.pid} is {self._process.state}; {self.describe_beat()}; {self._process.tail()}",
            fix="raise run.deadline_s if single responses really take that long",
        )

    def _unanswered(self, op: str, limit_s: float) -> DeadlineError:
        return DeadlineError(
            f"{self.name} has not answered for {limit_s:g} s",
            where=op,
            got=f"process {self._process.pid} is {self._process.state}; {self._process.tail()}",
            fix="look at that process and its log; raise run.deadline_s if this really takes so long",
        )

    def describe_beat(self) -> str:
        """The last sign of life, for an error message."""
        return self.beat.describe() if self.beat is not None else f"{self.name} never beat"

    def score(self, sequences: Sequence[Sequence[int]], *, deadline_s: float = UPDATE_S) -> list[list[float]]:
        """Log-probability, at temperature 1, of each token given those before it; 0 for the first of a sequence."""
        return self._call("score", deadline_s, sequences=[list(tokens) for tokens in sequences])

    @contextmanager
    def update(self, version: int, *, deadline_s: float = UPDATE_S) -> Iterator[Callable[[Bucket], None]]:
        """Bring new weights: `with engine.update(version) as load: load([(hf_name, tensor), ...])`, as often as needed.

        Every tensor of the HF directory must come exactly once, whole, under its HF name. On leaving the block the
        coverage is checked and the engine takes the version. deadline_s: for each bucket.
        Raises: EngineError; DeadlineError; after any error inside, the engine is dead.
        """
        with self._updating(version, None, deadline_s) as load:
            yield lambda bucket: load([self._outbox.pack(bucket)])

    @contextmanager
    def update_shards(
        self, version: int, announced: Sequence[Announced], *, deadline_s: float = UPDATE_S
    ) -> Iterator[Callable[[Sequence[Packed]], None]]:
        """The same from shards cut for each rank of the engine: `load([bucket of rank 0, bucket of rank 1, ...])`.

        announced: for each rank, SGLang's name of every parameter -> its shape there and how many of its elements will come.
        A bucket is what an outbox (memory.py, device_memory.py) of any process on this host says of its tensors, each a rectangle
        [rows, cols] under the name [parameter, leading indices, row, column]. Each announced element must come exactly once.
        Raises: as `update`.
        """
        if len(announced) != self.settings.tp:
            raise EngineError("shards for another engine", where=self.name, expected=f"{self.settings.tp} ranks", got=len(announced))
        with self._updating(version, list(announced), deadline_s) as load:
            yield load

    @contextmanager
    def _updating(self, version: int, announced: list[Announced] | None, deadline_s: float) -> Iterator[Callable[[Sequence[Packed]], None]]:
        self._check_alive()
        is_open = True

        def load(buckets: Sequence[Packed]) -> None:
            if not is_open:
                raise EngineError("load outside of a weight update", where=self.name, fix="call it inside `with engine.update(...)`")
            try:
                self._call("load", deadline_s, buckets=list(buckets))
            except BaseException as error:
                self._dead = f"the update to version {version} failed: {error}"  # also if the caller catches this
                raise

        self.version = None
        try:
            self._call("begin", deadline_s, shards=announced)
            yield load
            self._call("end", deadline_s, version=version)
        except BaseException as error:
            self._dead = f"the update to version {version} failed: {error}"
            raise
        finally:
            is_open = False
        self.version = version

    def release(self, *tags: str) -> None:
        """Give accelerator memory back: "kv_cache", "weights". Does nothing on a CPU, which has no memory saver."""
        if self.settings.device == "cuda":
            self._call("release", UPDATE_S, tags=list(tags))
            self._released |= set(tags)
            self.version = None if "weights" in tags else self.version

    def resume(self, *tags: str) -> None:
        """Take released memory again; weights come back empty and need an update. Does nothing for what was not released."""
        held = [tag for tag in tags if tag in self._released]
        if held:  # SGLang fails on a tag that it never paused, as before the first publish
            self._call("resume", UPDATE_S, tags=held)
            self._released -= set(held)

    def checksum(self) -> list[dict[str, int]]:
        """For each rank of the engine, a checksum of the bits of every parameter under SGLang's name for it."""
        return self._call("checksum", UPDATE_S)

    def abort(self) -> None:
        """End all requests in flight; they come out of `poll` with finish_reason "abort"."""
        self._call("abort", REPLY_S)

    def close(self) -> None:
        """End the engine. Returns when none of its processes is left. Safe to call again.

        It is killed: it keeps nothing that a gentle end would save, and SGLang's takes many seconds.
        """
        if self._socket.closed:
            return
        self._process.destroy()
        self._socket.close()
        self._outbox.close()

    def kill(self) -> None:
        """End the engine's processes. Safe to call from any thread; the client itself is of no use afterwards."""
        self._process.destroy()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, op: str, deadline_s: float, **args: Any) -> Any:
        """One request and its answer; completions that come meanwhile are kept for `poll`."""
        self._check_alive()
        self._ids += 1
        request_id = self._ids
        self._socket.send_string(json.dumps({"id": request_id, "op": op, "args": args}))
        deadline_s = min(deadline_s, self._deadline_s)
        self._looked = time.monotonic()
        limit, paused_s = self._looked + deadline_s, self._paused_s
        while request_id not in self._replies:
            if time.monotonic() > limit + self._paused_s - paused_s:
                self._dead = f"no answer to {op}"
                raise self._unanswered(op, deadline_s)
            self._dispatch(self._receive(POLL_S))
        reply = self._replies.pop(request_id)
        if "error" in reply:
            raise EngineError(f"{op} failed: {reply['error']}", where=self.name)
        return reply["result"]

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None. Raises: EngineError when nothing came and the process has ended."""
        self._note_pause()
        is_there = self._socket.poll(timeout_s * 1000)
        self._note_pause()
        if is_there:
            return json.loads(self._socket.recv())
        if not self._process.is_alive:
            self._dead = self._dead or "its process ended"
            raise self._process.died()
        return None

    def _note_pause(self) -> None:
        """A time in which this process did not look counts for no limit: both may have been stopped together."""
        now = time.monotonic()
        if now - self._looked > PAUSE_S:
            self._paused_s += now - self._looked
            self._progress = min(now, self._progress + now - self._looked)
        self._looked = now

    def _dispatch(self, message: dict[str, Any] | None) -> None:
        if message is None:
            return
        event = message.get("event")
        if event is None:
            self._replies[message["id"]] = message
        elif event == "beat":
            self.beat = EngineBeat(time.monotonic(), message["in_flight"], message["quiet_s"])
            self._progress = max(self._progress, self.beat.received - self.beat.quiet_s)
        elif event == "finished":
            key = message["key"]
            del self.in_flight[key]
            self._progress = time.monotonic()
            done = Completion(key, tuple(message["tokens"]), tuple(message["logp"]), message["finish_reason"], message["version"])
            self._finished.append(done)
        else:
            del self.in_flight[message["key"]]
            raise EngineError(f"request {message['key']} failed: {message['error']}", where=self.name, got=self._process.tail())

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(f"the engine is dead: {self._dead}", where=self.name, fix="close it and start another")
        if not self._process.is_alive:
            raise self._process.died()
