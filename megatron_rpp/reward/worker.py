"""The verifier process: `python -m megatron_rpp.reward.worker FD PARENT_PID MEMORY_BYTES NAME`.

It reads requests from a socket, calls the reward, and answers. It may be killed at any moment by its parent, and dies
with it. Standard library only, besides what the reward itself imports, so that it starts at once.
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
from megatron_rpp.reward.channel import Channel
from megatron_rpp.signals import die_with

MAX_REASON_CHARS = 500


def judge(reward: RewardFn, item: RewardInput) -> dict[str, object]:
    """Call the reward; whatever it does short of ending the process becomes an answer."""
    try:
        score = float(reward(item))
    except MemoryError:
        return {"failed": "memory", "reason": "the verifier ran out of its memory allowance"}
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt of a verifier are its failure too
        return {"failed": "exception", "reason": _describe(error)}
    if not math.isfinite(score):
        return {"failed": "bad value", "reason": f"the reward returned {score}, expected a finite number"}
    return {"score": score}


def _describe(error: BaseException) -> str:
    text = type(error).__name__
    with contextlib.suppress(Exception):  # an exception may fail to print itself
        text = f"{text}: {error}"
    return text[:MAX_REASON_CHARS]


def _limit_memory(allowance: int) -> None:
    """Cap the address space at what the loaded reward uses now plus the allowance, so that big imports cost nothing."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + allowance, used + allowance))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    fd, parent_pid, memory_bytes = (int(text) for text in sys.argv[1:4])
    die_with(parent_pid)
    os.dup2(2, 1)  # what a verifier prints must not reach a stdout that carries results
    channel = Channel(socket.socket(fileno=fd))
    try:
        reward = registry.get(sys.argv[4])
    except RewardError as error:
        channel.send({"error": str(error)})
        return
    _limit_memory(memory_bytes)
    channel.send({"ready": os.getpid()})
    with contextlib.suppress(EOFError):  # the parent closed the pool
        while True:
            channel.send(judge(reward, RewardInput(*channel.receive())))


if __name__ == "__main__":
    main()
