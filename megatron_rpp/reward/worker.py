"""The verifier process: `python -m megatron_rpp.reward.worker FD POOL_PID`.

It reads requests from a socket, first one to load a reward, then the responses to score, and answers each with the
request's id. It may be killed at any moment, and ends with its supervisor (supervisor.py). Standard library only, besides
what the reward itself imports, so that it starts at once.

A reward may fork, as code rewards do. Its child has no copy of the socket, and ends where it would come back into this
module: there is one verifier, and it alone answers.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import socket
import sys

from megatron_rpp.errors import RewardError
from megatron_rpp.reward import registry
from megatron_rpp.reward.base import RewardFn, RewardInput
from megatron_rpp.reward.channel import Channel, ChannelError
from megatron_rpp.reward.supervisor import fork_verifier

MAX_REASON_CHARS = 500
MAX_ANSWER_BYTES = 1 << 16  # a reason in ASCII escapes is at most a tenth of it
_MAX_LOAD_ERROR_CHARS = 5000


def judge(reward: RewardFn, item: RewardInput) -> dict[str, object]:
    """Call the reward; whatever it does short of ending the process becomes an answer. Returns in this process only."""
    own_pid = os.getpid()
    ended_by: BaseException | None = None
    try:
        score = float(reward(item))
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt of a verifier are its failure too
        ended_by = error.with_traceback(None)  # frees what the frames hold, which may be all the memory there is
    _end_fork_of(own_pid, ended_by)
    if isinstance(ended_by, MemoryError):
        return {"failed": "memory", "reason": "the verifier ran out of its memory allowance"}
    if ended_by is not None:
        return {"failed": "exception", "reason": describe(ended_by)}
    if not math.isfinite(score):
        return {"failed": "bad value", "reason": f"the reward returned {score}, expected a finite number"}
    return {"score": score}


def _end_fork_of(own_pid: int, error: BaseException | None = None) -> None:
    """End a process that user code forked, as Python would at the end of its program. In process `own_pid` do nothing."""
    if os.getpid() == own_pid:
        return
    code = int(error is not None)
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif error is not None:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"a process that the verifier forked ended with {describe(error)}\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code & 0xFF)


def describe(error: BaseException) -> str:
    """Its type and message, cut short. An exception of user code may fail to print itself."""
    text = type(error).__name__
    with contextlib.suppress(BaseException):
        text = f"{text}: {error}"
    return text[:MAX_REASON_CHARS]


def _limit_memory(allowance: int) -> None:
    """Cap the address space at what the loaded reward uses now plus the allowance, so that big imports cost nothing."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + allowance, used + allowance))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    fd, pool_pid = (int(text) for text in sys.argv[1:3])
    fork_verifier(pool_pid, fd)
    os.dup2(2, 1)  # what a verifier prints must not reach a stdout that carries results
    os.set_inheritable(fd, False)
    channel = Channel(socket.socket(fileno=fd))
    os.register_at_fork(after_in_child=channel.close)
    try:
        channel.send("started")  # from the kernel the pool learns which process this is, before user code can fork
        _serve(channel)
    except EOFError:  # the pool closed
        return 0
    except (ChannelError, OSError, TypeError, ValueError):  # the verifier closed the socket, or read from it
        return 1
    return 0


def _serve(channel: Channel) -> None:
    request_id, name, memory_bytes = channel.receive()
    reward = _load(name)
    if isinstance(reward, RewardError):
        channel.send({"id": request_id, "error": str(reward)[:_MAX_LOAD_ERROR_CHARS]})
        return
    _limit_memory(memory_bytes)
    channel.send({"id": request_id, "loaded": name})
    while True:
        request_id, *fields = channel.receive()
        channel.send({"id": request_id, **judge(reward, RewardInput(*fields))})


def _load(name: str) -> RewardFn | RewardError:
    own_pid = os.getpid()
    try:
        return registry.get(name)
    except RewardError as error:
        return error
    finally:
        _end_fork_of(own_pid)


if __name__ == "__main__":
    sys.exit(main())
