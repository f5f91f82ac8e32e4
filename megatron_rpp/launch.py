"""Start all ranks of a run on this host, for `rpp train run.yaml` typed by itself.

The ranks get torchrun's variables, so that a rank cannot tell who started it; torchrun and srun work as well, and then
nothing here is used. torchrun itself is not, because its agent imports torch into one more process, knows no signal
but the one to stop, and answers every failure with a table of its own.

Ranks other than 0 print into run.dir/logs/rank-N.log. A rank that fails leaves a report; the launcher stops the others
and shows the earliest report, once. A rank cannot outlive the launcher: the kernel ends it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_rpp.display import printable, printable_lines
from megatron_rpp.errors import ConfigError, RppError
from megatron_rpp.files import writing
from megatron_rpp.host import num_gpus
from megatron_rpp.leftovers import PrivateFolder, removed_after_death
from megatron_rpp.signals import WARNING, die_with, hold_warning

GRACE_S = 10.0  # from the first failure to SIGTERM, and from there to SIGKILL
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that went wrong: which rank, its exit code, and what to show."""

    rank: int
    exit_code: int
    message: str


def run_ranks(command: Sequence[str], num_ranks: int, *, log_dir: Path, is_cpu: bool) -> int:
    """Run `command` as `num_ranks` ranks on this host; the exit code of the run.

    A rank gets `--report FILE` appended, into which `write_report` puts its failure. SIGINT and SIGTERM stop all ranks,
    SIGUSR1, the warning to save, is passed on to them.
    Raises: ConfigError when this host has fewer GPUs than there are ranks.
    """
    if not is_cpu:
        _check_gpus(num_ranks)
    with writing(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
    with PrivateFolder() as reports, removed_after_death(reports), _Signals() as signals:
        ranks = _Ranks(command, num_ranks, log_dir=log_dir, reports=reports, is_cpu=is_cpu)
        try:
            failure = ranks.wait(signals)
        finally:
            ranks.stop()
    if signals.stop is not None:
        print(f"stopped by {signals.stop.name}", file=sys.stderr)
        return 128 + signals.stop
    if failure is None:
        return 0
    print(printable_lines(failure.message, indent=0), file=sys.stderr)
    print(printable(f"(rank {failure.rank} of {num_ranks}; what the others printed is in {log_dir})"), file=sys.stderr)
    return failure.exit_code


def write_report(path: Path, error: BaseException) -> None:
    """Leave word of this rank's failure for the launcher: the message of an error that a user can act on, else the traceback."""
    text = str(error) if isinstance(error, RppError) else "".join(traceback.format_exception(error)).rstrip()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"time": time.time(), "message": text}), encoding="utf-8")
    partial.replace(path)


class _Signals:
    """Inside the block, the signals that stop a run are remembered instead of ending this process."""

    _STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.wants_save = False
        self._mask: set[int] = set()
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Signals:
        for number in (*self._STOP, WARNING):
            self._before[number] = signal.signal(number, self._note)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})  # held until the ranks stand, now passed on
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == WARNING:
            self.wants_save = True
        else:
            self.stop = signal.Signals(number)


class _Ranks:
    """The processes of one run."""

    def __init__(self, command: Sequence[str], num_ranks: int, *, log_dir: Path, reports: Path, is_cpu: bool) -> None:
        self._log_dir, self._reports = log_dir, reports
        self._processes: list[subprocess.Popen[bytes]] = []
        self._seen_ended: dict[int, float] = {}
        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "GROUP_WORLD_SIZE": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        if is_cpu:
            shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # ranks share the cores; a pool each would fight
        parent = os.getpid()
        try:
            for rank in range(num_ranks):
                with self._output(rank) as output:
                    process = subprocess.Popen(
                        [*command, "--report", str(self._report(rank))],
                        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        process_group=0,  # Ctrl-C reaches the launcher alone, which then stops the ranks in order
                        preexec_fn=lambda: _begin_rank(parent),
                    )
                self._processes.append(process)
        except BaseException:
            self.stop()
            raise

    def wait(self, signals: _Signals) -> Failure | None:
        """Until all ranks have finished, one has failed, or a signal asks to stop."""
        while self._are_running():
            if signals.stop is not None:
                self._end_all(signals.stop)
                return None
            if signals.wants_save:
                signals.wants_save = False
                for process in self._processes:
                    process.send_signal(WARNING)
            if any(process.returncode not in (None, 0) for process in self._processes):
                self._await_all(GRACE_S)  # an error that all ranks share reaches each of them; let them tidy up
                break
            time.sleep(_POLL_S)
        return self._first_failure()

    def stop(self) -> None:
        """End whatever still runs."""
        self._end_all(signal.SIGTERM)

    def _are_running(self) -> bool:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                self._seen_ended.setdefault(rank, time.time())
        return len(self._seen_ended) < len(self._processes)

    def _first_failure(self) -> Failure | None:
        failed = [rank for rank, process in enumerate(self._processes) if process.returncode not in (None, 0)]
        if not failed:
            return None
        reports = {rank: json.loads(self._report(rank).read_text()) for rank in failed if self._report(rank).exists()}
        # A rank that was killed leaves no report, is seen a poll late, and its peers soon report the connection that it broke.
        rank = min(failed, key=lambda rank: reports[rank]["time"] if rank in reports else self._seen_ended[rank] - 1.0)
        code = self._processes[rank].returncode
        message = reports[rank]["message"] if rank in reports else f"rank {rank} {_how_it_ended(code)}{self._tail(rank)}"
        return Failure(rank, code if code > 0 else 128 - code, message)

    def _tail(self, rank: int, num_lines: int = 20) -> str:
        if rank == 0:
            return "; it printed on this terminal"
        lines = self._log(rank).read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
        return "; its last lines:\n" + "\n".join(f"  {line}" for line in lines) if lines else " and printed nothing"

    def _end_all(self, first: signal.Signals) -> None:
        for number in (first, signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                if process.poll() is None and number == signal.SIGKILL:
                    os.killpg(process.pid, number)  # with whatever it started in its own group
                elif process.poll() is None:
                    process.send_signal(number)
            self._await_all(GRACE_S)

    def _await_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._are_running() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _output(self, rank: int) -> Iterator[int | None]:
        """Rank 0 prints where the launcher prints, the others into their logs."""
        if rank == 0:
            yield None
        else:
            with open(self._log(rank), "wb") as log:
                yield log.fileno()

    def _log(self, rank: int) -> Path:
        return self._log_dir / f"rank-{rank}.log"

    def _report(self, rank: int) -> Path:
        return self._reports / f"rank-{rank}.json"


def _begin_rank(launcher: int) -> None:
    """Between fork and exec, so that no moment is left in which a warning would end the rank."""
    hold_warning()
    die_with(launcher)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")


def _free_port() -> int:
    """A port that nothing listens on now, below the range that outgoing connections take theirs from."""
    first, last = 20000, 32000
    start = os.getpid() % (last - first)
    for port in (first + (start + offset) % (last - first) for offset in range(last - first)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RppError(f"no free port between {first} and {last} on this host")


def _check_gpus(num_ranks: int) -> None:
    found = num_gpus()
    if found < num_ranks:
        raise ConfigError(
            "this host has too few GPUs for the layout",
            where="parallel",
            expected=f"{num_ranks} GPUs, one for each rank",
            got=found,
            fix="start the ranks on several hosts with srun or torchrun, shrink parallel.*, or set run.device: cpu",
        )
