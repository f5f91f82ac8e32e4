"""Where Python looks for modules. The working directory comes last, so that its files replace none of the standard library.

`python -m` puts the working directory first, and torch would then import a `numbers.py` there. So processes of a run are started
with `-P`, and `__main__` moves the directory to the end. Rewards in the working directory are still found.
"""

from __future__ import annotations

import os
import sys


def python_module(name: str) -> list[str]:
    """The command that runs a module in another process, without the working directory on its search path."""
    return [sys.executable, "-P", "-m", name]


def with_working_directory() -> list[str]:
    """The search path of this process as absolute paths, with the working directory at the end if it is missing.

    An entry that is no path, such as that of an editable installation's import hook, stays as it is.
    """
    entries = [os.path.abspath(entry) if os.path.exists(entry or os.curdir) else entry for entry in sys.path]
    here = os.path.abspath(os.curdir)
    return entries if here in entries else [*entries, here]


def add_working_directory() -> None:
    """Find modules in the working directory, too."""
    sys.path[:] = with_working_directory()
