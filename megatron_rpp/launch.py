"""Start all ranks of a run on this host, for `rpp train run.yaml` typed by itself.

The ranks get torchrun's variables, so that a rank cannot tell who started it; torchrun and srun work as well, and then
nothing here is used. torchrun itself is not, because its agent imports torch into one more process, knows no signal
but the one to stop, and answers every failure with a table of its own.

Ranks other than 0 print into run.dir/logs/rank-N.log. A rank that fails leaves a report; the launcher stops the others
and shows the earliest report, once. The launcher also reads the ranks' beats: a rank that is stopped or frozen does not exit
and reports nothing, and its peers name it only once they have joined it. A rank cannot outlive the launcher: the kernel ends
it (PR_SET_PDEATHSIG). What a rank has started and left behind, the launcher inherits (PR_SET_CHILD_SUBREAPER) and ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from megatron_rpp.display import printable, printable_lines
from megatron_rpp.dist.watch import Beat, read_beat
from megatron_rpp.errors import ConfigError, DeadlineError, RppError
from megatron_rpp.files import writing
from megatron_rpp.host import num_gpus, state_of
from megatron_rpp.leftovers import PrivateFolder, removed_after_death
from megatron_rpp.signals import WARNING, adopt_orphans, die_with, hold_warning, stop_signals

GRACE_S = 10.0  # from the first failure to SIGTERM, and from there to SIGKILL: a rank that gets SIGTERM is gone in less
START_SILENCE_S = 120.0  # at least, of a rank that starts: while it loads libraries none of its threads may run for seconds
_POLL_S = 0.05
_MARK = "RPP_LAUNCH"  # the variable by which a launch knows the processes that descend from its ranks


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that went wrong: which rank, its exit code, and what to show."""

    rank: int
    exit_code: int
    message: str


def run_ranks(command: Sequence[str], num_ranks: int, *, log_dir: Path, is_cpu: bool, silence_s: float) -> int:
    """Run `command` as `num_ranks` ranks on this host; the exit code of the run.

    A rank gets `--report FILE` appended, into which `leaving.write_report` puts its failure. SIGINT and SIGTERM stop all ranks,
    SIGUSR1, the warning to save, is passed on to them. silence_s: how long a rank may go without a beat before it is given up.
    Raises: ConfigError when this host has fewer GPUs than there are ranks.
    """
    if not is_cpu:
        _check_gpus(num_ranks)
    with writing(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
    with PrivateFolder() as reports, removed_after_death(reports), _Signals() as signals:
        adopt_orphans()
        ranks = _Ranks(command, num_ranks, log_dir=log_dir, reports=reports, is_cpu=is_cpu)
        try:
            failure = ranks.wait(signals, silence_s)
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


def beat_file(report: Path) -> Path:
    """Where the rank with this report puts its beats (dist/watch.py)."""
    return report.with_suffix(".beat")


class _Signals:
    """Inside the block, the signals that stop a run are remembered instead of ending this process."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.wants_save = False
        self._mask: set[int] = set()
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Signals:
        for number in (*stop_signals(), WARNING):
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
        self._log_dir, self._reports, self._mark = log_dir, reports, str(reports)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._seen_ended: dict[int, float] = {}
        self._beats = [_Beats(beat_file(self._report(rank))) for rank in range(num_ranks)]
        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "GROUP_WORLD_SIZE": "1"}
        shared |= {_MARK: self._mark, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
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

    def wait(self, signals: _Signals, silence_s: float) -> Failure | None:
        """Until all ranks have finished, one has failed or fallen silent, or a signal asks to stop."""
        while self._are_running():
            if signals.stop is not None:
                self._end_all(signals.stop)
                return None
            if signals.wants_save:
                signals.wants_save = False
                for process in self._processes:
                    process.send_signal(WARNING)
            if self._have_failed():
                # An error that all ranks share reaches each of them: let them tidy up. Those that do not beat never will.
                self._await_all(GRACE_S, silence_s / 2)
                break
            if (silent := self._silent_rank(silence_s)) is not None:
                return self._first_failure() or silent
            time.sleep(_POLL_S)
        failure = self._first_failure()
        return None if failure is None else replace(failure, message=failure.message + self._silences(silence_s / 2))

    def _have_failed(self) -> bool:
        return any(process.returncode not in (None, 0) or self._report(rank).exists() for rank, process in enumerate(self._processes))

    def _silences(self, least_s: float) -> str:
        """What a failure of others may come from: ranks that run and do not beat."""
        text = ""
        for rank, process in enumerate(self._processes):
            silent_s = self._beats[rank].silent_s()
            if process.returncode is None and silent_s > least_s:
                found = f"{self._beats[rank]}; process {process.pid} is {state_of(process.pid)}"
                text += f"\n  rank {rank} has not beaten for {silent_s:.1f} s: {found}"
        return text

    def _silent_rank(self, silence_s: float) -> Failure | None:
        """The failure of a rank that has not beaten for too long."""
        for rank, process in enumerate(self._processes):
            beats = self._beats[rank]
            silent_s = beats.silent_s()
            limit_s = max(silence_s, START_SILENCE_S) if beats.is_starting else silence_s
            if process.returncode is None and silent_s > limit_s:
                error = DeadlineError(
                    f"rank {rank} has been silent for {silent_s:.1f} s",
                    where="launcher",
                    expected=f"a heartbeat within {limit_s:g} s",
                    got=f"{beats}; process {process.pid} is {state_of(process.pid)}",
                    fix="find out what stopped or blocked that process; raise run.deadline_s if such a pause is normal here",
                )
                return Failure(rank, error.exit_code, str(error))
        return None

    def stop(self) -> None:
        """End whatever still runs, and what the ranks left behind."""
        self._end_all(signal.SIGTERM)
        _end_left_behind(self._mark)

    def _are_running(self) -> bool:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                self._seen_ended.setdefault(rank, time.time())
        return len(self._seen_ended) < len(self._processes)

    def _first_failure(self) -> Failure | None:
        reported = [rank for rank in range(len(self._processes)) if self._report(rank).exists()]
        reports = {rank: json.loads(self._report(rank).read_text()) for rank in reported}
        failed = [rank for rank, process in enumerate(self._processes) if rank in reports or process.returncode not in (None, 0)]
        if not failed:
            return None
        # An error that all ranks share is that of the rank that met it.
        own = [rank for rank in failed if rank not in reports or reports[rank]["origin"] is None]
        # A rank that was killed leaves no report, is seen a poll late, and its peers soon report the connection that it broke.
        rank = min(own or failed, key=lambda rank: reports[rank]["time"] if rank in reports else self._seen_ended[rank] - 1.0)
        code = self._processes[rank].returncode
        if rank in reports:  # without an exit code of its own where it had to be killed
            return Failure(rank, code if code is not None and code > 0 else reports[rank]["code"], reports[rank]["message"])
        return Failure(rank, code if code > 0 else 128 - code, f"rank {rank} {_how_it_ended(code)}{self._tail(rank)}")

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
                    process.send_signal(signal.SIGCONT)  # a stopped process takes no signal but SIGKILL
            self._await_all(GRACE_S)

    def _await_all(self, seconds: float, silence_s: float = math.inf) -> None:
        """Until all ranks have ended, but not longer than `seconds`, and not for ranks that have been silent for silence_s."""
        deadline = time.monotonic() + seconds
        while self._are_running() and time.monotonic() < deadline:
            running = [rank for rank, process in enumerate(self._processes) if process.returncode is None]
            if all(self._beats[rank].silent_s() > silence_s for rank in running):
                break
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


class _Beats:
    """What the launcher sees of one rank's beats. Units: seconds on the launcher's own clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = self._looked = time.monotonic()
        self.beat: Beat | None = None

    @property
    def is_starting(self) -> bool:
        return self.beat is None or self.beat.is_starting

    def __str__(self) -> str:
        return "no beat came" if self.beat is None else f"the last one said: {self.beat.doing} for {self.beat.elapsed_s:.1f} s"

    def silent_s(self) -> float:
        """Seconds since the last beat that was seen. A gap in which the launcher itself stood still does not count."""
        now = time.monotonic()
        beat = read_beat(self._path)
        if now - self._looked > 2.0:
            self._changed = now
        if beat is not None and (self.beat is None or beat.written != self.beat.written):
            self.beat, self._changed = beat, now
        self._looked = now
        return now - self._changed


def _end_left_behind(mark: str) -> None:
    """Kill what ranks that were killed have left: every descendant of this process that has inherited the mark of the launch."""
    import psutil

    left = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=GRACE_S)


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
