"""The engine's process: `python -m megatron_rpp.rollout.server SETTINGS_JSON OWNER_PID`.

Owned by the leader rank of an engine group, which made its private folder and listens on a socket in it. The messages
are JSON objects; each request has an id that its one answer repeats. A `generate` is answered at once, and every response
follows as a message of its own as soon as it ends. `beat` messages tell that the process lives and whether tokens come.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from megatron_rpp.errors import EngineError, RppError
from megatron_rpp.leftovers import remove_folder
from megatron_rpp.rollout import coverage, hook, worker
from megatron_rpp.rollout.process import kill_session
from megatron_rpp.rollout.settings import SOCKET_NAME, EngineSettings, model_overrides, server_args
from megatron_rpp.signals import wake_when_parent_ends

OWNER_CHECK_S = 0.5
BEAT_S = 1.0


def die_with_owner(owner: int) -> None:
    """Kill this whole session as soon as the owner is gone, and remove what the engine has made outside of the run directory.

    A SIGKILL by the kernel (PR_SET_PDEATHSIG) will not do: it also comes when the thread that started us ends, it reaches no grandchild
    and removes no folder. The thread below does not run in a process that is stopped: so the kernel is asked for a SIGCONT.
    """
    wake_when_parent_ends()

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(OWNER_CHECK_S)
        kill_session(os.getsid(0))
        remove_folder(worker.folder())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


class Link:
    """The socket to the client. Plain while the engine is being built, asynchronous afterwards."""

    def __init__(self, folder: Path) -> None:
        self._socket = zmq.Context().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # a response is never dropped, however busy the client is
        self._socket.connect(f"ipc://{folder / SOCKET_NAME}")
        self._async: zmq.asyncio.Socket | None = None

    def tell(self, **message: Any) -> None:
        """Send one message; never waits, the client always reads.

        Once the socket is asynchronous everything goes through its asynchronous face: ZeroMQ signals an arrival once, and
        a plain send would swallow the signal of a request that arrives meanwhile, which then is never seen.
        """
        (self._socket if self._async is None else self._async).send_string(json.dumps(message), zmq.NOBLOCK)

    async def receive(self) -> dict[str, Any]:
        """The next request."""
        if self._async is None:
            self._async = zmq.asyncio.Socket.shadow(self._socket)
        return json.loads(await self._async.recv())


def build_engine(settings: EngineSettings, tell: Callable[..., None]) -> Any:
    """The SGLang engine with all its processes, every one of them patched. Raises: PatchError, EngineError."""
    worker.install()
    tell(event="phase", phase="importing sglang")
    from sglang.srt.arg_groups import choices
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers.load_snapshot import shm_path_for

    class PatchedEngine(Engine):
        run_scheduler_process_func = staticmethod(worker.run_scheduler)

        @classmethod
        def _launch_detokenizer_subprocesses(cls, **_: Any) -> tuple[list, list]:
            return [], []  # with token ids in and out nothing is ever sent to it, and it costs an import of sglang

    # Attention goes through the sequences one by one there, and settings.py keeps prefixes and chunks out of it. The second list
    # is of those that SGLang lets share prefixes, and of those that it lets run latent attention: cpu_attention.py sees to that.
    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    tell(event="phase", phase="starting SGLang's workers and loading weights")
    ours = {"custom_weight_loader": [hook.LOADER], "json_model_override_args": model_overrides(settings)}
    engine = PatchedEngine(**(server_args(settings) | ours))
    worker.write_report("server", "0")
    Path(shm_path_for(engine.port_args.instance_id)).unlink(missing_ok=True)  # open where it is needed, and so never left behind
    return engine


def check_reports(settings: EngineSettings, reports: list[dict[str, Any]]) -> None:
    """Raise EngineError unless the server and every scheduler worker report the same active patches."""
    workers = [report for report in reports if report["role"] == "scheduler"]
    if len(workers) != settings.tp:
        raise EngineError(
            "not every worker reported its patches",
            where=settings.name,
            expected=f"{settings.tp} scheduler reports",
            got=[f"{report['role']} {report['rank']}" for report in reports],
            fix="run `python -m megatron_rpp_patches status`; SGLang must start its workers by multiprocessing spawn on this host",
        )
    wanted = {row["id"] for report in reports for row in report["patches"] if row["active"]}
    for report in reports:
        missing = sorted(wanted - {row["id"] for row in report["patches"] if row["active"]})
        if missing:
            raise EngineError(
                f"{report['role']} {report['rank']} (pid {report['pid']}) runs without patches",
                where=settings.name,
                expected=sorted(wanted),
                got=f"missing {missing}",
                fix="run `pip install -e .` again so that the plugin is registered, then `python -m megatron_rpp_patches status`",
            )


class Server:
    """Answers the client's requests. All state lies here: the version of the weights, the requests in flight."""

    def __init__(self, settings: EngineSettings, engine: Any, link: Link) -> None:
        self.settings, self.engine, self.link = settings, engine, link
        self.tokens = engine.tokenizer_manager
        self.version: int | None = None
        self.session: str | None = None
        self.is_sharded = False
        self.ticket = 0
        self.in_flight: dict[str, asyncio.Task] = {}
        self.aborted: set[str] = set()

    async def run(self) -> None:
        """Serve until somebody kills us."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            while True:
                await self._answer(await self.link.receive())

    async def _answer(self, message: dict[str, Any]) -> None:
        operation: Callable[..., Awaitable[Any]] = getattr(self, f"do_{message['op']}")
        try:
            result = await operation(**message["args"])
        except Exception as error:  # noqa: BLE001 whatever SGLang raises is an answer to the client, which raises it there
            self.link.tell(id=message["id"], error=str(error) if isinstance(error, RppError) else f"{type(error).__name__}: {error}")
        else:
            self.link.tell(id=message["id"], result=result)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            if not self.in_flight:
                continue  # nobody listens between roll-outs, for as long as a training step takes
            quiet_s = time.time() - self.tokens.last_receive_tstamp
            self.link.tell(event="beat", in_flight=len(self.in_flight), quiet_s=round(quiet_s, 1))

    async def do_hello(self, version: int | None) -> dict[str, Any]:
        """Who serves here. version: what the caller calls the weights of the HF directory."""
        await self._set_version(version)
        return {"reports": worker.read_reports(), "is_seeded": bool(self.engine.server_args.enable_deterministic_inference)}

    async def do_generate(self, requests: list[dict[str, Any]], version: int) -> None:
        """Start requests; each ends in a `finished` or a `failed` message."""
        if version != self.version:
            raise EngineError("other weights", where=self.settings.name, expected=f"version {version}", got=f"version {self.version}")
        for request in requests:
            task = asyncio.create_task(self._generate_one(**request))
            self.in_flight[request["key"]] = task

    async def _generate_one(self, key: str, tokens: list[int], sampling: dict[str, Any]) -> None:
        version = self.version
        try:
            output = await self._ask(input_ids=tokens, sampling_params=sampling, return_logprob=True)
            answer = _completion(output, version, is_aborted=key in self.aborted)
        except Exception as error:  # noqa: BLE001 as in _answer
            self.link.tell(event="failed", key=key, error=f"{type(error).__name__}: {error}")
        else:
            self.link.tell(event="finished", key=key, **answer)
        finally:
            del self.in_flight[key]
            self.aborted.discard(key)

    async def _ask(self, **request: Any) -> dict[str, Any]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        return await anext(self.tokens.generate_request(GenerateReqInput(**request), None))

    async def do_score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of given tokens, by prefill; 0 for the first of each sequence."""
        sampling = {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True}
        asks = (self._ask(input_ids=each, sampling_params=sampling, return_logprob=True, logprob_start_len=0) for each in sequences)
        outputs = await asyncio.gather(*asks)
        return [[0.0] + [entry[0] for entry in output["meta_info"]["input_token_logprobs"][1:]] for output in outputs]

    async def do_begin(self, shards: list[dict[str, Any]] | None = None) -> None:
        """Open a weight update; whatever was known of the weights is now void.

        shards: for each rank of the engine the parameters that come in shards; None announces whole tensors under HF names.
        """
        from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput

        if self.in_flight:
            raise EngineError(f"{len(self.in_flight)} requests are in flight", where=self.settings.name, fix="poll them to their end first")
        self._check(await self.tokens.begin_weight_update(BeginWeightUpdateReqInput()))
        if shards is not None:
            coverage.announce_shards(shards)
        self.session, self.is_sharded, self.version = uuid.uuid4().hex, shards is not None, None

    async def do_load(self, buckets: list[dict[str, Any] | None]) -> None:
        """Fill parameters from trainers' memory: one bucket for each rank of the engine, or one for all; None: all have come."""
        await self._order(buckets * self.settings.tp if len(buckets) == 1 else buckets)

    async def _order(self, buckets: list[dict[str, Any] | None], *, is_checksum: bool = False) -> list[Any]:
        """Have every worker's hook do something inside a weight update; what each answers, by rank."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        self.ticket += 1
        order = {"session": self.session, "ticket": self.ticket, "is_sharded": self.is_sharded, "is_checksum": is_checksum}
        payloads = [_pickled_name(json.dumps(order | {"bucket": bucket})) for bucket in buckets]
        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=payloads, load_format=hook.LOADER, flush_cache=False)
        self._check(await self.tokens.update_weights_from_tensor(request, None))
        results, errors = hook.read_results(self.settings.tp, self.ticket)
        if errors:
            raise EngineError("; ".join(errors), where=self.settings.name)
        return results

    async def do_end(self, version: int) -> None:
        """Close the update, forget all cached prefixes, and take the new version."""
        await self.do_load([None])
        await self._close_update()
        flushed = await self.tokens.flush_cache()
        self._check((flushed.success, "the prefix cache could not be flushed"))
        await self._set_version(version)

    async def _close_update(self) -> None:
        from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

        self._check(await self.tokens.end_weight_update(EndWeightUpdateReqInput()))
        self.session = None

    async def _set_version(self, version: int | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput

        if version is not None:
            await self.tokens.update_weight_version(UpdateWeightVersionReqInput(new_version=str(version)))
        self.version = version

    async def do_release(self, tags: list[str]) -> None:
        """Give memory back, by SGLang's tags."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self.tokens.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=tags))

    async def do_resume(self, tags: list[str]) -> None:
        """Take released memory again; weights come back without their contents."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        if "weights" in tags:
            self.version = None
        await self.tokens.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))

    async def do_checksum(self) -> list[dict[str, int]]:
        """Checksums of every parameter, by rank: an update that changes nothing. (SGLang's own checker needs CUDA.)"""
        version = self.version
        await self.do_begin()
        results = await self._order([None] * self.settings.tp, is_checksum=True)
        await self._close_update()
        self.version = version
        return results

    async def do_abort(self) -> int:
        """End all requests in flight; they finish as aborted."""
        self.aborted |= self.in_flight.keys()
        self.tokens.abort_request(abort_all=True)
        return len(self.in_flight)

    def _check(self, reply: tuple[bool, str]) -> None:
        """SGLang answers a refused update with success=False and nothing else."""
        success, message = reply
        if not success:
            raise EngineError(f"SGLang refused: {message}", where=self.settings.name)


def _pickled_name(name: str) -> bytes:
    """An SGLang tensor payload that carries nothing but a name: an empty tensor has no storage to share."""
    import torch
    from sglang.srt.utils import MultiprocessingSerializer

    return MultiprocessingSerializer.serialize([(name, torch.empty(0))])


def _completion(output: dict[str, Any], version: int, *, is_aborted: bool) -> dict[str, Any]:
    """What the client is told of a finished request.

    Raises: EngineError if SGLang refused it, or sampled any of it with other weights.
    """
    meta = output["meta_info"]
    spans = {span["version"] for span in meta.get("weight_versions") or []}
    if spans - {str(version)}:
        raise EngineError(f"sampled with weights {sorted(spans)}, expected {version}")
    logprobs = meta["output_token_logprobs"]
    tokens = list(output["output_ids"])
    if [entry[1] for entry in logprobs] != tokens:
        raise EngineError(f"SGLang returned {len(tokens)} tokens and log-probabilities of {len(logprobs)} others")
    reason = meta["finish_reason"]
    if reason["type"] == "abort" and not is_aborted:
        raise EngineError(reason.get("message") or "SGLang aborted it")
    return {"tokens": tokens, "logp": [entry[0] for entry in logprobs], "finish_reason": reason["type"], "version": version}


def main() -> None:
    settings = EngineSettings(**json.loads(sys.argv[1]))
    owner = int(sys.argv[2])
    die_with_owner(owner)
    link = Link(worker.folder())
    try:
        coverage.write_expected(Path(settings.hf))
        engine = build_engine(settings, link.tell)
        check_reports(settings, worker.read_reports())
    except RppError as error:
        link.tell(event="refused", error=str(error))
        raise
    link.tell(event="ready")
    engine.loop.run_until_complete(Server(settings, engine, link).run())


if __name__ == "__main__":
    main()
