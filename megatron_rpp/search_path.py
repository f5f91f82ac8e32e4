"""Where Python looks for modules: the working directory comes last, so that no file in it replaces a module of the standard library.

`python -m` puts the working directory first. torch would import a `numbers.py` there in place of Python's own. A reward of the user
is still found there. Processes of a run are therefore started with `-P`, and `__main__` moves the directory to the end.
"""

from __future__ import annotations

import os
import sys


def python_module(name: str) -> list[str]:
    """The command that runs a module in another process, without the working directory on its search path."""
    return [sys.executable, "-P", "-m", name]


def with_working_directory() -> list[str]:
    """This process's search path as absolute paths, with the working directory at the end unless it has a place already."""
    entries = [os.path.abspath(entry) for entry in sys.path]
    here = os.path.abspath(os.curdir)
    return entries if here in entries else [*entries, here]


def add_working_directory() -> None:
    """Find modules in the working directory, too."""
    sys.path[:] = with_working_directory()
