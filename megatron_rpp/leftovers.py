"""What a run keeps outside of its directory, and how to find it after the run was killed.

A process makes a private folder in TMPDIR and holds a lock on a file in it. The kernel releases the lock when the process ends,
however that happens, so a folder whose lock is free was left by a dead process. The processes of an engine list in its folder the
semaphores and segments that they make in /dev/shm, because their names do not say whose they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PREFIX = "rpp-"
SHARED_MEMORY = Path("/dev/shm")
_UNFINISHED = ".rpp-new-"  # what a folder is called until its lock is held
_UNFINISHED_S = 3600.0  # after which nobody will finish it
_LOCK, _LIST = "owner.lock", "shared-memory.txt"
# What multiprocessing and SGLang call theirs. A list with another name in it is not believed.
_NAMES = re.compile(r"(sem\.mp-|psm_|sgl_shm_|sglang_loads_)[\w.-]+")
# Its standard input ends when the process that started it does.
_WAIT_AND_REMOVE = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


class PrivateFolder:
    """A folder of this process, mode 0700, until `remove`. Its path is short because it holds sockets."""

    def __init__(self) -> None:
        draft = Path(tempfile.mkdtemp(prefix=_UNFINISHED))
        self._lock = open(draft / _LOCK, "wb")  # noqa: SIM115 -- held until `remove`
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = draft.with_name(PREFIX + draft.name.removeprefix(_UNFINISHED))
        draft.rename(self.path)

    def remove(self) -> None:
        """Remove the folder and what is listed in it. No process may use it any more. Safe to call again."""
        remove_folder(self.path)
        self._lock.close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


@contextlib.contextmanager
def removed_after_death(folder: Path) -> Iterator[None]:
    """Inside the block another process waits for the end of this one, and then removes the folder. SIGKILL is no exception."""
    line = [sys.executable, "-P", "-I", "-S", "-c", _WAIT_AND_REMOVE, str(folder)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True):
        yield


@dataclass(frozen=True, slots=True)
class Leftover:
    """The folder of a dead process, and those of its semaphores and segments in /dev/shm that nobody uses."""

    folder: Path
    shared: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.shared if path.exists())


def list_shared(folder: Path, name: str) -> None:
    """Note that a process makes /dev/shm/`name`; in one write, so that processes do not mix their lines."""
    with open(folder / _LIST, "ab", buffering=0) as file:
        file.write(f"{name.lstrip('/')}\n".encode())


def find_leftovers() -> list[Leftover]:
    """What dead processes of this user have left in TMPDIR and /dev/shm."""
    used = _mapped()
    found = []
    for folder in _own_folders(Path(tempfile.gettempdir())):
        with _abandoned(folder) as is_abandoned:
            if is_abandoned:
                found.append(Leftover(folder, tuple(path for path in _shared_of(folder) if path not in used)))
    return found


def remove_folder(folder: Path, *, keep: Collection[Path] = ()) -> None:
    """Remove a private folder, and what it lists in /dev/shm except `keep`. No process may use it any more."""
    for path in _shared_of(folder):
        if path not in keep:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_if_abandoned(folder: Path) -> bool:
    """Remove a private folder and what it lists if its process is dead. Returns whether it was removed."""
    with _abandoned(folder) as is_abandoned:
        if is_abandoned:
            remove_folder(folder, keep=_mapped())
        return is_abandoned


def _own_folders(parent: Path) -> Iterator[Path]:
    for path in sorted(parent.iterdir()):
        if path.name.startswith((PREFIX, _UNFINISHED)):
            with contextlib.suppress(FileNotFoundError):
                if path.stat(follow_symlinks=False).st_uid == os.geteuid() and path.is_dir() and not path.is_symlink():
                    yield path


@contextlib.contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether the process of a folder is dead. Inside the block no other process gets the answer True."""
    lock: IO[bytes] | None = None
    try:
        lock = open(folder / _LOCK, "r+b")  # noqa: SIM115 -- closed below
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_abandoned = folder.name.startswith(PREFIX) or _is_old(folder)
    except FileNotFoundError:  # not a folder of ours, or killed before it was finished
        is_abandoned = folder.name.startswith(_UNFINISHED) and _is_old(folder)
    except OSError:
        is_abandoned = False
    try:
        yield is_abandoned
    finally:
        if lock is not None:
            lock.close()


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > _UNFINISHED_S
    except FileNotFoundError:
        return False


def _shared_of(folder: Path) -> Iterator[Path]:
    """Files in /dev/shm that the folder lists and that belong to this user."""
    try:
        names = (folder / _LIST).read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return
    for name in dict.fromkeys(names):
        path = SHARED_MEMORY / name
        with contextlib.suppress(FileNotFoundError):
            if _NAMES.fullmatch(name) and path.stat(follow_symlinks=False).st_uid == os.geteuid():
                yield path


def _mapped() -> set[Path]:
    """Files in /dev/shm that a living process has mapped or open, as far as this user can see."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found |= {
                Path(line.split(maxsplit=5)[-1]) for line in (process / "maps").read_text().splitlines() if str(SHARED_MEMORY) in line
            }
            found |= {path for link in (process / "fd").iterdir() if (path := link.readlink()).parent == SHARED_MEMORY}
    return found
