"""Rewards that misbehave as the response tells them to. Imported in verifier processes by its import path."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

from megatron_rpp.reward.base import RewardInput

NOT_A_FUNCTION = 3


def obey(item: RewardInput) -> float:
    """Do what the response says; anything else is its own score."""
    acts = {
        "spin": _spin,
        "sleep": lambda: time.sleep(600),
        "exit": lambda: os._exit(42),
        "segfault": lambda: ctypes.string_at(0),
        "memory": lambda: len(bytes(6 << 30)),  # never touched: without a limit it costs nothing
        "raise": _raise,
        "raise unprintable": _raise_unprintable,
        "sys.exit": lambda: sys.exit(3),
        "recurse": lambda: _recurse(0),
        "nan": lambda: float("nan"),
        "text": lambda: "high",
        "nothing": lambda: None,
        "print": lambda: print("noise " * 1000) or 1.0,
        "spawn": _spawn_and_sleep,
        "pid": lambda: float(os.getpid()),
        "torch": lambda: float("torch" in sys.modules or "sympy" in sys.modules),
    }
    if item.response in acts:
        return acts[item.response]()
    return float(item.response)


def echo_length(item: RewardInput) -> float:
    return float(len(item.prompt) + 10 * len(item.response) + 100 * len(item.answer) + 1000 * len(item.prompt_end))


def _spin() -> None:
    while True:
        pass


def _raise() -> None:
    raise ValueError("no verdict today")


class _UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def _raise_unprintable() -> None:
    raise _UnprintableError


def _recurse(depth: int) -> int:
    return _recurse(depth + 1) + 1


def _spawn_and_sleep() -> None:
    """A verifier with a child of its own, whose pid it leaves in a file."""
    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["RPP_TEST_PID_FILE"], "w") as file:
        file.write(str(child.pid))
    time.sleep(600)
