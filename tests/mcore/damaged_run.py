"""Every damaged checkpoint through every way to open one, in one Megatron rank: resume,
model.megatron_checkpoint, a tool.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.data.prompts import PromptStream
from megatron_rpp.errors import RppError
from megatron_rpp.resume import RunState, begin_save, commit_save, read_state, step_dir
from megatron_rpp.types import Prompt
from tests.dist.ranks import run_ranks
from tests.mcore import damaged, tiny
from tests.mcore.test_tools_convert import inside

HANG_S = 30
Job = tuple[str, Callable[[Path, Path], str], list[str]]  # a name, what is done to the copy, and the ways to open it
STEP = 4
OUTCOMES = ("refused", "loaded", "traceback", "hang", "ran")


@dataclass(frozen=True)
class Outcome:
    """outcome: refused, loaded, traceback, hang or ran. message: the error, or where it came from."""

    what: str
    way: str
    outcome: str
    message: str
    seconds: float


class HangError(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


def _alarm(*_: object) -> None:
    raise HangError


def prompts() -> PromptStream:
    return PromptStream([Prompt(uid=f"p{n}", tokens=(1, 2), text="", answer="") for n in range(9)], seed=3)


class Ways:
    """Each way to open a checkpoint, as a call on the directory of a step."""

    def __init__(self, hf: Path, policy: Any, update: Callable[[], object]) -> None:
        self.hf, self.policy, self.update = hf, policy, update
        self.calls: dict[str, Callable[[Path], None]] = {"resume": self._resume, "start": self._start, "verify": self._verify}

    def _resume(self, where: Path) -> None:
        state = read_state(where)
        self.policy.load(where / damaged.POLICY)
        stream = prompts()
        stream.load_state_dict(state.prompts)
        stream.take(5)
        self.update()  # what was loaded must not break the next step

    def _start(self, where: Path) -> None:
        self.policy.load_weights(where / damaged.POLICY)

    def _verify(self, where: Path) -> None:
        done = inside("verify_checkpoint", where / damaged.POLICY, self.hf, "--hf", self.hf)
        if "error: " in done.stderr:
            raise RppError(done.stderr[done.stderr.index("error: ") :])

    def attempt(self, what: str, way: str, where: Path, marker: Path) -> Outcome:
        """One opening, timed."""
        start, message = time.monotonic(), ""
        signal.alarm(HANG_S)
        try:
            self.calls[way](where)
            outcome = "loaded"
        except RppError as error:
            outcome, message = "refused", str(error)
        except HangError:
            outcome, message = "hang", traceback.format_exc()
        except Exception as error:  # noqa: BLE001  # any but the family is what is looked for
            outcome, message = "traceback", "".join(traceback.format_exception(error)[-4:])
        finally:
            signal.alarm(0)
        if marker.exists():
            outcome = "ran"
            marker.rmdir()
        return Outcome(what, way, outcome, message, time.monotonic() - start)


def attack(rank: int, hf: Path, scratch: Path, seeds: list[int], places: list[str], is_quick: bool) -> tuple[list[Outcome], list[str]]:
    """The outcomes, and what is wrong with a clean load after them all and with the memory they took."""
    cfg = tiny.make_config(hf)
    signal.signal(signal.SIGALRM, _alarm)
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        batch, adv_T = tiny.make_batch(tiny.make_groups())
        update = partial(policy.update, batch, adv_T, cfg.algo, objective=tiny.surrogate)
        update()
        root = scratch / "checkpoints"
        root.mkdir()
        policy.save(begin_save(root, STEP) / damaged.POLICY)
        clean = commit_save(root, RunState(STEP, prompts().state_dict(), "d"), keep=1)
        before = [tensor.detach().clone() for _, _, tensor in policy.named_local()]
        ways = Ways(hf, policy, update)
        assert [ways.attempt("clean", way, clean, scratch / "ran").outcome for way in ways.calls] == ["loaded"] * 3
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = list(_attempts(ways, clean, scratch, _jobs(seeds, places, is_quick)))
        wrong = []
        if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) > 200_000:
            wrong.append(f"memory grew by {grown} kB")
        policy.load(clean / damaged.POLICY)
        if not all(torch.equal(old, new) for old, (_, _, new) in zip(before, policy.named_local(), strict=True)):
            wrong.append("a clean load gives other weights")
    return found, wrong


def _jobs(seeds: list[int], places: list[str], is_quick: bool) -> Iterable[Job]:
    all_ways = ["resume", "start", "verify"]
    for place in places:

        def put(where: Path, marker: Path, place: str = place) -> str:
            damaged.PLACES[place](where / damaged.POLICY, damaged.Payload(marker))
            damaged.list_files(where / damaged.POLICY)
            return place

        yield place, put, all_ways
    for seed in seeds:
        chosen = all_ways[: 1 + 2 * (seed % 4 == 0)] if is_quick else all_ways
        yield str(seed), lambda where, marker, seed=seed: damaged.damage(where, seed, marker), chosen


def _attempts(ways: Ways, clean: Path, scratch: Path, jobs: Iterable[Job]) -> Iterable[Outcome]:
    where, marker = step_dir(scratch / "damaged", STEP), scratch / "ran"
    for name, change, chosen in jobs:
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(clean, where)
        said = f"{name} {change(where, marker)}"
        for way in chosen:
            yield ways.attempt(said, way, where, marker)


def main(count: int) -> int:
    """The table of `count` checkpoints, each opened in every way."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        hf = tiny.make_hf(scratch / "hf", "qwen2", layers=2)
        arguments = (hf, scratch, list(range(count)), list(damaged.PLACES), False)
        ((found, wrong),) = run_ranks(1, attack, *arguments, init=False, timeout_s=3000.0)
    for one in found:
        if "-v" in sys.argv and one.outcome == "loaded":
            print(f"{one.way} loaded: {one.what}")
        if one.outcome not in ("refused", "loaded"):
            print(f"{one.way} {one.outcome}: {one.what}\n{one.message}")
    print(f"{'kind':<16}{'way':<8}{''.join(f'{name:>10}' for name in OUTCOMES)}  slowest")
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for one in found:
        kind = one.what.partition(" ")[2].partition(":")[0] if one.what[0].isdigit() else "payload place"
        rows.setdefault((kind, one.way), []).append(one)
    for (kind, way), ones in [*sorted(rows.items()), (("all", ""), found)]:
        counts = Counter(one.outcome for one in ones)
        shown = "".join(f"{counts[name]:>10}" for name in OUTCOMES)
        print(f"{kind:<16}{way:<8}{shown}{max(one.seconds for one in ones):>7.1f} s")
    print(*wrong, sep="\n")
    return int(bool(wrong) or any(one.outcome not in ("refused", "loaded") for one in found))
