"""The one door through which a run says what it does: records for machines, rows for people."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from megatron_rpp.config.schema import Observe
from megatron_rpp.observe import sinks
from megatron_rpp.observe.console import Console, open_console
from megatron_rpp.observe.metrics import Value, encode, encode_timing, summarise
from megatron_rpp.observe.rundir import RunDir


class RunLog:
    """Every rank has one and calls it alike; the one with `run`, rank 0, writes and prints."""

    def __init__(self, observe: Observe, run: RunDir | None, *, resumed_step: int = 0) -> None:
        """run: the opened run directory, None on every other rank. resumed_step: the checkpoint that the run goes on from."""
        self._run = run
        self._console: Console = open_console(observe.console, is_leader=run is not None)
        self._metrics = sinks.RecordFile(run.metrics, encode, resumed_step=resumed_step) if run is not None else None
        self._timings = sinks.RecordFile(run.timings, encode_timing, resumed_step=resumed_step) if run is not None else None
        for file in (self._metrics, self._timings):
            for warning in file.warnings if file is not None else ():
                self._console.warn(warning)
        is_drawn = run is not None and observe.tensorboard
        self._board = sinks.TensorBoard(run.tensorboard, resumed_step=resumed_step) if is_drawn else None
        self._held_out: dict[str, Value] = {}
        self._warned: set[str] = set()

    def step(self, step: int, values: Mapping[str, Value], *, timing: Mapping[str, float] | None = None) -> None:
        """Record one finished training step and show its row. timing: what the clock says, in a file of its own."""
        self._append("step", step, values, timing)
        self._console.row(step, {**self._held_out, **values}, timing or {})
        self._held_out = {}

    def evaluation(self, step: int, values: Mapping[str, Value], *, timing: Mapping[str, float] | None = None) -> None:
        """Record an evaluation of the weights of `step`; its accuracy is said, and shown again in the next row."""
        self._append("eval", step, values, timing)
        self._held_out = {name: value for name, value in values.items() if name == "eval/accuracy"}
        accuracy = values.get("eval/accuracy")
        if isinstance(accuracy, int | float):
            text = f"{step:6d}  held-out accuracy {accuracy:.4f} on {values.get('eval/num_prompts', '?')} prompts"
            truncated = values.get("eval/truncated_frac", 0.0)
            self._console.say(f"{text}, {truncated:.0%} of the answers truncated" if truncated else text)

    def sft(self, step: int, num_steps: int, values: Mapping[str, Value]) -> None:
        """Record one step of a supervised warm-up, and show how far it is."""
        self._append("sft", step, values, None)
        self._console.warm_up(step, num_steps, values)

    def has(self, kind: str, step: int) -> bool:
        """Whether the file holds that record (`step` or `eval`) already. Only the writing rank knows; False elsewhere."""
        return self._metrics is not None and self._metrics.has(kind, step)

    def progress(self, what: str, done: int, total: int, tokens: int) -> None:
        """Show how far the roll-out named `what` is: responses and tokens."""
        self._console.progress(what, done, total, tokens)

    def say(self, text: str) -> None:
        self._console.say(text)

    def warn(self, text: str, *, once: str | None = None) -> None:
        """once: the name of a warning that is not said again until the process ends, though its text may change."""
        if once not in self._warned:
            self._console.warn(text)
        if once is not None:
            self._warned.add(once)

    def summary(self) -> dict[str, Value]:
        """The whole run in one value a name; empty on ranks that do not write."""
        return summarise(sinks.read(self._metrics.path)) if self._metrics is not None else {}

    def close(self) -> None:
        self._console.close()
        for sink in (self._metrics, self._timings, self._board):
            if sink is not None:
                sink.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _append(self, kind: str, step: int, values: Mapping[str, Value], timing: Mapping[str, float] | None) -> None:
        """Raises: StorageError when the run directory was removed, or a file cannot be written."""
        if self._run is not None:
            self._run.check_held()
        if self._metrics is not None:
            self._metrics.append(kind, step, values)
        if self._timings is not None and timing:
            self._timings.append(kind, step, timing)
        if self._board is not None:
            self._board.append(kind, step, {**values, **{f"timing/{name}": value for name, value in (timing or {}).items()}})
