"""The error family. Every error a user can meet says what, where, expected, got and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.display import printable, printable_lines

_MAX_LINE = 4000  # characters: a damaged file must not flood the terminal


class RppError(Exception):
    """Base of every error that megatron_rpp raises for a reason a user can act on.

    The command line prints the message without a traceback and exits with `exit_code`. The message has no control character but
    the newline, and only its own labels and details begin less than four spaces from the left.

    details: lines of the message, each indented by two spaces.
    """

    exit_code = 1
    origin: int | None = None  # the rank that met it, where another rank raises it as well
    is_shared: bool = False  # whether all ranks raise it, or an echo of it

    def __init__(
        self,
        what: str,
        *,
        details: Sequence[str] = (),
        where: str | None = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        head = _shown(what) if where is None else f"{printable(_clipped(where))}: {_shown(what)}"
        lines = [head, *(f"  {_shown(detail)}" for detail in details)]
        for label, value in (("expected", expected), ("got", got), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label}: {_shown(str(value))}")
        super().__init__("\n".join(lines))


def _shown(text: str) -> str:
    return printable_lines("\n".join(_clipped(line) for line in text.split("\n")), indent=4)


def _clipped(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}... ({len(line):,} characters)"


class ConfigError(RppError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""

    exit_code = 2


class GeometryError(ConfigError):
    """Layers, heads, ranks or batch sizes do not divide as the layout needs."""


class PatchError(RppError):
    """A patch is missing, stale, or was written for another source than the one installed."""

    exit_code = 3


class DataError(RppError):
    """A prompt file is missing or holds a row that cannot be used."""


class RewardError(RppError):
    """A reward is unknown or cannot be imported. A verifier that fails at run time is data, not this."""


class EngineError(RppError):
    """The roll-out engine did not start, answered wrongly, or died."""


class StaleWeightsError(EngineError):
    """The engine holds another version of the weights than the one asked for."""


class DeadlineError(RppError):
    """A named wait took longer than its deadline."""


class NumericsError(RppError):
    """A loss, gradient, advantage or statistic is not finite, or train and roll-out disagree."""


class StorageError(RppError):
    """A file or directory cannot be written: the disk is full, read-only, broken, or the directory was removed."""


class CheckpointError(RppError):
    """A checkpoint or HF directory is missing, incomplete, or does not fit the configuration."""


class StoreError(RppError):
    """A value in the store of the run was written by a process that is no rank of it."""
