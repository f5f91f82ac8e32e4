"""The engine's process as its owner sees it: start it, ask whether it lives, quote its log, leave nothing of it behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from megatron_rpp.errors import EngineError
from megatron_rpp.host import state_of
from megatron_rpp.leftovers import PrivateFolder
from megatron_rpp.rollout.settings import FOLDER_VARIABLE, EngineSettings, environment
from megatron_rpp.search_path import python_module

TAIL_LINES = 15
KILL_WAIT_S = 5.0
_CLEANS_UP = "from multiprocessing.resource_tracker import main"  # on its command line


class EngineProcess:
    """`python -m megatron_rpp.rollout.server` in a session of its own, with a private folder for its socket and reports."""

    def __init__(self, settings: EngineSettings, log: Path) -> None:
        self.name, self.log = settings.name, log
        self._private = PrivateFolder()
        self.folder = self._private.path
        log.parent.mkdir(parents=True, exist_ok=True)
        env = environment(settings, os.environ) | self._places()
        command = [*python_module("megatron_rpp.rollout.server"), json.dumps(asdict(settings)), str(os.getpid())]
        with open(log, "ab") as output:
            self._popen = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        self.pid = self._popen.pid
        self._running = time.monotonic()  # when it was last seen not to be stopped

    def _places(self) -> dict[str, str]:
        """Variables that keep what the engine's processes share in its folder, and out of the way of other engines.

        SGLang leaves a socket file in TMPDIR for each of its queues. Its workers meet at a port that was free some seconds
        ago, and with several engines starting is taken by then; a file is not.
        """
        caches = f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}"  # torch would put its own in TMPDIR, to be lost
        return {
            FOLDER_VARIABLE: str(self.folder),
            "TMPDIR": str(self.folder),
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", caches),
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self.folder}/rendezvous",
        }

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def state(self) -> str:
        """What the kernel says of the process, as "in state stopped"."""
        return state_of(self.pid)

    def stopped_s(self) -> float:
        """How long the process has been stopped (SIGSTOP), as far as this function was called meanwhile. Units: seconds."""
        if self.state != f"in state {psutil.STATUS_STOPPED}":
            self._running = time.monotonic()
        return time.monotonic() - self._running

    def died(self) -> EngineError:
        """The error to raise when it is not alive, with the end of its log."""
        code = self._popen.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineError(
            f"the engine's process ended ({how})",
            where=self.name,
            expected="a live engine",
            got=self.tail(),
            fix=f"read {self.log}; the first error in it is the cause",
        )

    def tail(self) -> str:
        """The last lines of the log, indented for an error message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        except FileNotFoundError:
            lines = []
        return f"end of {self.log}:" + "".join(f"\n    {line}" for line in lines)

    def members(self) -> list[int]:
        """Pids of all processes of the engine's session that still run."""
        return [process.pid for process in members_of(self.pid)]

    def destroy(self) -> None:
        """Kill what is left of it, wait until all of it is gone, remove the folder. Safe to call again."""
        kill_session(self.pid)
        self._popen.wait()
        self._await_end()
        for pid in self.members():
            _kill(pid)
        self._await_end()
        self._private.remove()

    def _await_end(self) -> None:
        limit = time.monotonic() + KILL_WAIT_S
        while self.members() and time.monotonic() < limit:
            time.sleep(0.05)


def members_of(session: int) -> list[psutil.Process]:
    """The processes of a session that still run."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def kill_session(session: int) -> None:
    """Kill every process of a session but this one, and but those of multiprocessing that clean up.

    These wait until all others are gone, remove the semaphores and the shared memory that are left, and end.
    """
    for process in members_of(session):
        try:
            if process.pid != os.getpid() and _CLEANS_UP not in " ".join(process.cmdline()):
                _kill(process.pid)
        except psutil.NoSuchProcess:
            continue


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
