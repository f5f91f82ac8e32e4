"""The run directory: all that a run writes, and all it needs to go on.

config.yaml      every setting in force                 metrics.jsonl    one record a step, equal for equal runs
versions.json    Python, packages, this source          timings.jsonl    what the clock said of each step
patches.json     which runtime patches were active      tensorboard/     both, as curves
logs/rank-N.log  what rank N printed                    checkpoints/     see resume.py
run.lock         held while a process writes here      engine/          what engines with rollout.dtype fp8_block start from
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from megatron_rpp.errors import RppError, StorageError
from megatron_rpp.files import refuse_unusable, write_whole, writing
from megatron_rpp.version import __version__

PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "transformer-engine", "safetensors", "numpy", "triton")


class RunDir:
    """One run's directory. The paths are the same on every rank; only the rank that holds the lock writes metrics and state."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.timings = path / "timings.jsonl"
        self.tensorboard = path / "tensorboard"
        self.config = path / "config.yaml"
        self.logs = path / "logs"
        self._lock: IO[str] | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[RunDir]:
        """Make the directory and hold it until the end of the block, so that no second run writes into it.

        The lock is the kernel's: it is gone with the process, however that ends. One rank of a run, rank 0, opens it.
        Raises: RppError when another run holds it; StorageError when it cannot be made.
        """
        run = cls(path)
        refuse_unusable(path, "run.dir")
        with writing(path):
            for directory in (run.path, run.checkpoints, run.logs):
                directory.mkdir(parents=True, exist_ok=True)
            run._lock = open(path / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 -- closed below
        try:
            _take(run._lock, path)
            yield run
        finally:
            run._lock.close()

    def check_held(self) -> None:
        """Check that the directory is still the one that `open` locked. Raises: StorageError when it was removed or replaced."""
        held = os.fstat(self._lock.fileno())
        try:
            found = os.stat(self.path / "run.lock")
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise StorageError(
                "the run directory was removed or replaced while the run was writing to it",
                where=str(self.path),
                expected="the directory that the run was started in",
                got="no run.lock there" if found is None else "the run.lock of another run",
                fix="start the run again; it resumes from the newest checkpoint that is left in run.dir",
            )

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def write_text(self, name: str, text: str) -> Path:
        """Write a file whole or not at all. Raises: StorageError."""
        write_whole(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, value: Mapping[str, Any] | list[Any]) -> Path:
        """`write_text` of indented JSON with sorted names."""
        return self.write_text(name, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _take(lock: Any, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise RppError(
            "another run is writing here", where=str(path), got=holder, fix="wait for it, stop it, or choose another run.dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def versions() -> dict[str, Any]:
    """What this process runs: Python, the packages whose versions matter (null: absent), this source's version and commit."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {
        "megatron_rpp": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": found,
    }


def _commit() -> str | None:
    """The commit of the source, `+changed` when files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed into somebody else's repository
        return git("rev-parse", "HEAD") + ("+changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send all that this process prints, native code included, to the end of a file. For ranks other than 0."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open(path, "ab", buffering=0)  # noqa: SIM115 -- closed below, once both streams lead to it
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    with log:
        for stream, _ in saved:
            os.dup2(log.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
