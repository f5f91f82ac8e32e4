"""What a person sees of a run: progress inside a step, one row for each step. Only rank 0 has one that prints.

`rich` draws progress bars and a table on a terminal; `plain` writes lines that a log file can keep; `off` says only warnings.
Text that is said may come from files, models and verifiers: it is shown escaped (display.py), and never as markup of rich.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from megatron_rpp.display import printable, printable_lines
from megatron_rpp.observe.metrics import Value

Mode = Literal["auto", "rich", "plain", "off"]

# (heading, width, where the number comes from, format). A step without such a number shows a dash.
COLUMNS: tuple[tuple[str, int, str, str], ...] = (
    ("score", 7, "score/mean", ".3f"),
    ("held-out", 8, "eval/accuracy", ".3f"),
    ("length", 7, "response/tokens_mean", ".1f"),
    ("cut %", 6, "cut", ".1f"),  # responses that the length limit ended
    ("mismatch", 9, "mismatch/mean_abs", ".2e"),
    ("clip %", 6, "clip", ".2f"),
    ("grad", 9, "policy/grad_norm", ".3g"),
    ("tok/s", 8, "tokens_per_s", ",.0f"),
    ("step s", 7, "step_s", ".1f"),
)
HEADING = "  step  " + "  ".join(f"{heading:>{width}}" for heading, width, _, _ in COLUMNS)
_ROWS_PER_HEADING = 20
_WARM_UP_LINES = 10
_QUIET_S = 30.0  # the least time between two progress lines in a log file


class Console(Protocol):
    def progress(self, what: str, done: int, total: int, tokens: int) -> None: ...
    def row(self, step: int, values: Mapping[str, Value], timing: Mapping[str, float]) -> None: ...
    def warm_up(self, step: int, num_steps: int, values: Mapping[str, Value]) -> None: ...
    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def close(self) -> None: ...


def open_console(mode: Mode, *, is_leader: bool = True, stream: TextIO | None = None) -> Console:
    """The console of this process. auto: rich on a terminal, plain elsewhere; off on every rank but the leader."""
    stream = stream or sys.stdout
    if not is_leader or mode == "off":
        return Off(stream if is_leader else None)
    if mode == "auto":
        mode = "rich" if stream.isatty() else "plain"
    return Rich(stream) if mode == "rich" else Plain(stream)


def format_row(step: int, values: Mapping[str, Value], timing: Mapping[str, float]) -> str:
    """One step as a line under HEADING."""
    known: dict[str, Value] = {**values, **timing}
    parts = [value for name in ("policy/clip_frac_low", "policy/clip_frac_high") if isinstance(value := values.get(name), float)]
    if parts:
        known["clip"] = 100.0 * sum(parts)
    if isinstance(truncated := values.get("response/truncated_frac"), float):
        known["cut"] = 100.0 * truncated
    cells = [f"{known[name]:{form}}" if isinstance(known.get(name), int | float) else "-" for _, _, name, form in COLUMNS]
    return f"{step:6d}  " + "  ".join(f"{cell:>{width}}" for cell, (_, width, _, _) in zip(cells, COLUMNS, strict=True))


def format_warm_up(step: int, num_steps: int, values: Mapping[str, Value]) -> str:
    """One step of a supervised warm-up as a line."""
    numbers = "  ".join(f"{name.removeprefix('sft/')} {value:.4g}" for name, value in values.items() if isinstance(value, float))
    return f"{step:6d}/{num_steps}  {numbers}"


def _shown(text: str) -> str:
    return printable_lines(text, indent=2)


class Off:
    """Nothing but warnings; not even those on ranks other than 0, whose numbers are the same."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def progress(self, what: str, done: int, total: int, tokens: int) -> None:
        """Shows nothing."""

    def row(self, step: int, values: Mapping[str, Value], timing: Mapping[str, float]) -> None:
        """Shows nothing."""

    def warm_up(self, step: int, num_steps: int, values: Mapping[str, Value]) -> None:
        """Shows nothing."""

    def say(self, text: str) -> None:
        """Shows nothing."""

    def warn(self, text: str) -> None:
        if self._stream is not None:
            print(_shown(f"warning: {text}"), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class Plain:
    """Lines for a log file."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._rows = 0
        self._last_progress = clock()

    def progress(self, what: str, done: int, total: int, tokens: int) -> None:
        if self._clock() - self._last_progress >= _QUIET_S:
            self._last_progress = self._clock()
            self._print(f"        {what}: {done}/{total} responses, {tokens:,} tokens")

    def row(self, step: int, values: Mapping[str, Value], timing: Mapping[str, float]) -> None:
        if self._rows % _ROWS_PER_HEADING == 0:
            self._print(HEADING)
        self._rows += 1
        self._last_progress = self._clock()
        self._print(format_row(step, values, timing))

    def warm_up(self, step: int, num_steps: int, values: Mapping[str, Value]) -> None:
        if step == num_steps or step % max(1, num_steps // _WARM_UP_LINES) == 0:
            self._print(format_warm_up(step, num_steps, values))

    def say(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}")

    def close(self) -> None:
        self._stream.flush()

    def _print(self, text: str) -> None:
        print(_shown(text), file=self._stream, flush=True)


class Rich:
    """A terminal: a bar for the roll-out under way, above it the steps so far."""

    def __init__(self, stream: TextIO) -> None:
        self._console = RichConsole(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
        )
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True, refresh_per_second=4)
        self._task: TaskID | None = None
        self._what = ""
        self._rows = 0

    def progress(self, what: str, done: int, total: int, tokens: int) -> None:
        if self._task is None or what != self._what:
            self._clear()
            self._task, self._what = self._progress.add_task(printable(what), total=total, tokens=0), what
            self._progress.start()
        self._progress.update(self._task, completed=done, tokens=tokens)
        if done >= total:
            self._clear()

    def row(self, step: int, values: Mapping[str, Value], timing: Mapping[str, float]) -> None:
        self._clear()
        if self._rows % _ROWS_PER_HEADING == 0:
            self._console.print(HEADING, style="bold")
        self._rows += 1
        self._console.print(format_row(step, values, timing))

    def warm_up(self, step: int, num_steps: int, values: Mapping[str, Value]) -> None:
        what = "warm-up"
        if self._task is None or what != self._what:
            self._clear()
            self._task, self._what = self._progress.add_task(printable(what), total=num_steps, tokens=0), what
            self._progress.start()
        self._progress.update(self._task, completed=step)
        if step == num_steps or step % max(1, num_steps // _WARM_UP_LINES) == 0:
            self._console.print(format_warm_up(step, num_steps, values))
        if step == num_steps:
            self._clear()

    def say(self, text: str) -> None:
        self._console.print(_shown(text))

    def warn(self, text: str) -> None:
        self._console.print(_shown(f"warning: {text}"), style="yellow")

    def close(self) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._task, self._what = None, ""
