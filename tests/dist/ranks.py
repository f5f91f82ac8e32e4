"""`run_ranks`: several gloo processes for one test, with a deadline and every rank's own traceback."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_rpp.dist.world import FIRST_PORT, NUM_PORTS

# Importing torch is most of a spawned process's life. A server that has imported it, and nothing else, is forked instead.
_CONTEXT = mp.get_context("forkserver")
PRELOADED = ["torch", "torch.distributed"]
_CONTEXT.set_forkserver_preload(PRELOADED)
# How long the others may go on once one rank has failed: usually they fail too, and their words help.
GRACE_S = 5.0
_TURNS = itertools.count()  # its next() is one step even among threads
_PORTS_APART = 101  # of processes with neighbouring ids, which often run together; coprime to NUM_PORTS


class RankError(AssertionError):
    """A rank raised, died or hung. `tracebacks` maps the rank to what it said."""

    def __init__(self, message: str, tracebacks: dict[int, str]) -> None:
        self.tracebacks = tracebacks
        super().__init__("\n".join([message, *(f"---- rank {rank} ----\n{text}" for rank, text in sorted(tracebacks.items()))]))


def run_ranks(n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0, init: bool = True) -> list[Any]:
    """Calls `fn(rank, *args)` in n fresh processes and returns what each returned, by rank.

    The children have this process's environment, torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and a free MASTER_PORT), one thread each, nothing imported but torch, and, unless `init` is False, a default
    gloo process group whose own timeout is `timeout_s`.
    fn, args and results must pickle; fn must be importable (a module's top level).
    Raises: RankError with each failing rank's traceback, or its stack when it was still running after `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        home, env = Path(folder), {**os.environ, **_launch_variables(n)}
        children = [_CONTEXT.Process(target=_child, args=(rank, n, home, env, timeout_s, init, fn, args)) for rank in range(n)]
        with _one_thread():
            for child in children:
                child.start()
        try:
            _join(children, timeout_s)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()
        return _results(home, [child.exitcode for child in children], timeout_s)


def _join(children: list[Any], timeout_s: float) -> None:
    # The children dump their stacks and exit at timeout_s; the parent allows for their start-up and is only the last resort.
    end = time.monotonic() + timeout_s + 30.0
    while time.monotonic() < end and any(child.is_alive() for child in children):
        for child in children:
            child.join(0.02)
        if any(child.exitcode not in (None, 0) for child in children):
            end = min(end, time.monotonic() + GRACE_S)


def _results(home: Path, exit_codes: list[int | None], timeout_s: float) -> list[Any]:
    results, tracebacks = [], {}
    for rank, exit_code in enumerate(exit_codes):
        result, error, stack = home / f"{rank}.result", home / f"{rank}.error", home / f"{rank}.stack"
        if result.exists() and exit_code == 0:
            results.append(pickle.loads(result.read_bytes()))
        elif error.exists():
            tracebacks[rank] = error.read_text()
        else:
            stack_text = stack.read_text() if stack.exists() else ""
            tracebacks[rank] = f"exit code {exit_code}, no result\n{stack_text}"
    if tracebacks:
        raise RankError(f"{len(tracebacks)} of {len(exit_codes)} ranks failed (limit {timeout_s:g} s)", tracebacks)
    return results


def _child(
    rank: int, n: int, home: Path, env: dict[str, str], timeout_s: float, init: bool, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    # The server that this process was forked from has the environment of the first test, not of this one.
    os.environ.clear()
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    with open(home / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stack)
        try:
            if init:
                store = dist.FileStore(str(home / "store"), n)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=timeout_s))
            payload = pickle.dumps(fn(rank, *args))
            (home / f"{rank}.result").write_bytes(payload)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:  # noqa: BLE001  the parent raises it again, whatever it was
            (home / f"{rank}.error").write_text(traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
            os._exit(1)  # the atexit handlers of a broken process group can hang
        faulthandler.cancel_dump_traceback_later()


def _launch_variables(n: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # OpenMP reads this when it is loaded, so it must stand before the server starts.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def free_port() -> int:
    """A port that nothing listens on now, below the range that outgoing connections take theirs from.

    A rank listens seconds after the port was looked for, and until then nothing shows that it is taken: so no other call of
    this process gets it before all others had their turn, and other processes begin elsewhere.
    """
    for _ in range(NUM_PORTS):
        port = FIRST_PORT + (os.getpid() * _PORTS_APART + next(_TURNS)) % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} on this host")
