"""Files that a run writes: an error names the file, its file system and what is free there; a file is whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_rpp.errors import RppError, StorageError

# A disk that fails, and paths that lead nowhere. Other things, such as a refused connection, are an OSError as well.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
_PATH = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
_RESTART = "start the run again: it resumes from its newest checkpoint"
_FIXES = {
    errno.ENOSPC: f"free some space there, then {_RESTART}",
    errno.EDQUOT: f"free some space there or raise the quota, then {_RESTART}",
    errno.EROFS: "choose a directory on a file system that can be written",
    errno.EACCES: "make the directory writable, or choose another one",
    errno.EPERM: "make the directory writable, or choose another one",
    errno.EIO: f"look for errors of the disk in the kernel's log, then {_RESTART}",
    errno.ESTALE: f"mount the file system again, then {_RESTART}",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Work on one file or directory. Raises: StorageError naming it when the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path | None = None) -> StorageError:
    """The error of a file system in words: the file, the reason, what is free.

    path: the file that was worked on; None takes the one that the error names.
    """
    named = path or (Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None)
    return StorageError(
        f"the file system refused: {error.strerror or error}",
        where=str(named) if named is not None else None,
        got=describe_space(named) if named is not None else None,
        fix=_FIXES.get(error.errno, f"check that the directory is still there, then {_RESTART}"),
    )


@contextmanager
def storage_errors_named() -> Iterator[None]:
    """The outermost door of a command: errors of files that nobody put into words below. Raises: StorageError for those."""
    try:
        yield
    except RppError:
        raise
    except Exception as error:
        cause = _storage_cause(error)
        if cause is None:
            raise
        raise storage_error(cause) from error


def _storage_cause(error: BaseException | None) -> OSError | None:
    """The error of a file behind an exception. Libraries wrap those of the disk; a path is only looked for in the exception itself,
    since code that tries one path after another leaves such errors behind. Without a path it is not about a file: a signal, a port."""
    if isinstance(error, OSError) and error.errno in _PATH and error.filename is not None:
        return error
    for _ in range(20):
        if error is None or (isinstance(error, OSError) and error.errno in _DISK):
            return error
        error = error.__cause__ or error.__context__
    return None


def describe_space(path: Path) -> str:
    """What is free where a file lies or would lie: "0 B of 6.0 MiB are free on /scratch (tmpfs)"."""
    try:
        place = nearest_existing(path)
        usage = shutil.disk_usage(place)
    except OSError as error:
        return f"its free space is not known ({error.strerror})"
    mount = place.resolve()
    while not mount.is_mount():
        mount = mount.parent
    kind = _kind_of(mount)
    return f"{_size(usage.free)} of {_size(usage.total)} are free on {mount}" + (f" ({kind})" if kind else "")


def refusal(error: OSError, path: Path) -> str:
    """What the system said, and what is free: "No space left on device; 0 B of 6.0 MiB are free on /scratch (tmpfs)"."""
    return f"{error.strerror or error}; {describe_space(path)}"


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists. Raises: OSError, such as for a name that is too long."""
    path = path.absolute()
    while True:
        try:
            os.lstat(path)
            return path
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent


def refuse_unusable(folder: Path, setting: str) -> None:
    """Check that a directory can be made, or written to where it exists. Makes nothing.

    Raises: StorageError naming the setting when a file is in the way, or the file system or its permissions refuse.
    """
    with writing(folder):
        place = nearest_existing(folder)
        if not place.is_dir():
            raise StorageError(
                "a file is where a directory must be made",
                where=f"{setting}={folder}",
                expected="a directory, or a path at which one can be made",
                got=f"{place} is not a directory",
                fix=f"choose another {setting}, or move the file away",
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise StorageError(
                "the directory cannot be made or written to",
                where=f"{setting}={folder}",
                expected=f"write permission in {place}",
                got="a read-only file system" if os.statvfs(place).f_flag & os.ST_RDONLY else f"no permission for user {os.getuid()}",
                fix=f"choose another {setting}, or make that directory writable",
            )


def refuse_full(path: Path, num_bytes: int, setting: str) -> None:
    """Check that something of that size fits where it will be written.

    Raises: StorageError naming the setting.
    """
    with writing(path):
        free = shutil.disk_usage(nearest_existing(path)).free
    if free < num_bytes:
        raise StorageError(
            "the disk has too little space for the result",
            where=f"{setting}={path}",
            expected=f"{_size(num_bytes)} free",
            got=describe_space(path),
            fix=f"free some space there, or choose another {setting}",
        )


def make_inside(root: Path, folder: Path) -> None:
    """Make a directory below `root`, which must exist: a root that was removed does not come back.

    Raises: StorageError.
    """
    with writing(folder):
        missing: list[Path] = []
        while folder != root and not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed. Raises: StorageError."""
    partial = path.with_name(f".partial-{path.name}")
    with writing(path):
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(path)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file: nothing stays in a buffer that a later close would try to write. Raises: OSError."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _kind_of(mount: Path) -> str:
    """The type of a mounted file system, such as "ext4" or "lustre"; empty where the kernel does not say."""
    kind = ""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return kind
    for line in lines:
        _, place, fs_type, *_ = line.split(" ")
        if place.replace("\\040", " ") == str(mount):
            kind = fs_type  # the last mount covers those before
    return kind


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
