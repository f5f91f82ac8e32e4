"""What can stand in the place of a file and is none: how to make it, and the reason for which it is not read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path], object]
ODD_FILES: dict[str, tuple[Make, str]] = {
    "a pipe": (os.mkfifo, "a named pipe, not a regular file"),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
    "a directory": (os.mkdir, "a directory, not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
}


def make_sparse(path: Path) -> None:
    """A file of 1 TiB that takes no space."""
    path.touch()
    os.truncate(path, 2**40)
