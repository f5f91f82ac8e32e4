"""Everything that is wrong with the settings, said at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong.

    path: the dotted setting.
    message: may have more than one line.
    where: file:line or `command line`, empty when nobody wrote it.
    """

    path: str
    message: str
    where: str = ""


def refuse(problems: Sequence[Problem], source: str, kind: type[ConfigError] = ConfigError, *, is_all: bool = True) -> None:
    """Raises: `kind` with one line for each problem, when there is any. is_all: False if there are more than these."""
    if not problems:
        return
    counted = "1 setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
    counted = counted if is_all else f"more than {len(problems)} settings are wrong; these are some of them"
    prefix = [f"{problem.where}  " if problem.where else "" for problem in problems]
    indented = [problem.message.replace("\n", "\n    ") for problem in problems]
    lines = [f"{where}{problem.path}: {message}" for where, problem, message in zip(prefix, problems, indented, strict=True)]
    raise kind(counted, details=lines, where=source)
