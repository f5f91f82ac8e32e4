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
from typing import Any

from megatron_rpp.errors import RppError
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

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[RunDir]:
        """Make the directory and hold it until the end of the block, so that no second run writes into it.

        The lock is the kernel's: it is gone with the process, however that ends. One rank of a run, rank 0, opens it.
        Raises: RppError when another run holds it, or when it cannot be made.
        """
        run = cls(path)
        try:
            for directory in (run.path, run.checkpoints, run.logs):
                directory.mkdir(parents=True, exist_ok=True)
            lock = open(path / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 -- closed in the finally below
        except OSError as error:
            raise RppError(f"cannot make the run directory: {error.strerror}", where=str(path), fix="set run.dir") from None
        try:
            _take(lock, path)
            yield run
        finally:
            lock.close()

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def write_text(self, name: str, text: str) -> Path:
        """Write a file whole or not at all: under another name first, then renamed."""
        target = self.path / name
        partial = target.with_name(f".partial-{target.name}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
        return target

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
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    with open(path, "ab", buffering=0) as log:
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
