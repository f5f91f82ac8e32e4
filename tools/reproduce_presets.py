"""Train the quickstart's task with several presets and seeds, and write the table of docs/experiments.md.

    python tools/reproduce_presets.py                                       # every preset, seed 0
    python tools/reproduce_presets.py --presets grpo ppo --seeds 0 1 2 --out build/presets -- parallel.tp=1
    python tools/reproduce_presets.py --hard --seeds 0 1 2 -- parallel.tp=1          # the problems to compare presets on
    python tools/reproduce_presets.py --out build/presets --table           # the table of what has been run, nothing else

For each seed a model and its problems are made and warmed up once; each preset starts from that model. Every run is the
product's own: `rpp train examples/quickstart/run.yaml preset=...`. What follows `--` goes to every run. --hard takes the
quickstart's hard problems (examples/quickstart/chains.py) with HARD's settings. A run that stands complete in the output
directory is not repeated, so a call that was cut off goes on. A run that fails or warns is told and shows in the table.
Exit status 1 when one failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"

# What a preset needs on this task beside its paper's settings: plain losses have gradients of another scale than clipped ones.
EXTRA: dict[str, tuple[str, ...]] = {
    "remax": ("rollout.samples_per_prompt=1", "rollout.prompts_per_step=256"),
    "ppo": ("rollout.samples_per_prompt=1", "rollout.prompts_per_step=256", "critic.lr=5e-4"),
    "reinforce_pp": ("rollout.samples_per_prompt=1", "rollout.prompts_per_step=256"),
}


# The hard problems' own settings. Accuracy is that of samples, at the training's temperature: a greedy answer is right as soon as
# the right result is the likeliest, and 20 steps would take it to 1. The corpus has 100 facts, which 450 steps of warm-up
# learn for every seed tried; 300 did not.
HARD = ("sft.steps=450", "eval.every=10", "eval.temperature=1.0", "checkpoint.every=100")
STEPS, HARD_STEPS = 20, 30


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    curve: (step, accuracy on the held-out problems), from before the first step to after the last. response_tokens: mean length
    in the last step. warnings: lines of the log that warn.
    """

    preset: str
    seed: int
    curve: tuple[tuple[int, float], ...]
    response_tokens: float
    train_s: float
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        return self.curve[-1][0]

    @property
    def accuracy(self) -> float:
        return self.curve[-1][1]

    @property
    def area(self) -> float:
        """Mean accuracy over the steps: the trapezoids between evaluations. Of two runs that end alike, the quicker has more."""
        trapezoids = ((right - left) * (before + after) / 2 for (left, before), (right, after) in itertools.pairwise(self.curve))
        return sum(trapezoids) / (self.steps - self.curve[0][0])

    def __str__(self) -> str:
        return " -> ".join(f"{accuracy:.3f}" for _, accuracy in self.curve)


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = parse(list(sys.argv[1:] if arguments is None else arguments))
    out = options.out / "hard" if options.hard else options.out
    steps = options.steps or (HARD_STEPS if options.hard else STEPS)
    own = HARD if options.hard else ()
    failed = 0
    if not options.table:
        for seed in options.seeds:
            warm_up(out, seed, (*own, *overrides), hard=options.hard)
            for preset in options.presets:
                failed += not train(out, preset, seed, (f"run.steps={steps}", *own, *overrides))
    outcomes = [outcome for preset in PRESETS for seed in range(100) if (outcome := read(out, preset, seed)) is not None]
    print(table(outcomes))
    return 1 if failed else 0


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help=f"default {STEPS}, {HARD_STEPS} with --hard")
    parser.add_argument("--hard", action="store_true", help="the quickstart's hard problems; runs lie in OUT/hard")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "presets")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def warm_up(out: Path, seed: int, overrides: Sequence[str], *, hard: bool) -> None:
    """The model that every preset of a seed starts from, made once."""
    folder = out / f"seed{seed}"
    if (folder / "warm" / "config.json").is_file():
        return
    call([sys.executable, QUICKSTART / "make_assets.py", folder, "--seed", str(seed), *(["--hard"] if hard else [])])
    settings = (f"sft.out={folder / 'warm'}", f"run.dir={folder / 'warm-up'}", f"model.hf={folder / 'model'}")
    if call(rpp("sft", seed, folder, (*settings, *overrides)), log=folder / "warm-up.log"):
        sys.exit(f"the warm-up of seed {seed} failed: see {folder / 'warm-up.log'}")


def train(out: Path, preset: str, seed: int, overrides: Sequence[str]) -> bool:
    """One run, unless it is there. Whether it succeeded."""
    folder = out / f"seed{seed}"
    run_dir = folder / preset
    if read(out, preset, seed) is not None:
        return True
    settings = (f"preset={preset}", f"run.dir={run_dir}", f"model.hf={folder / 'warm'}", *EXTRA.get(preset, ()), *overrides)
    start = time.monotonic()
    code = call(rpp("train", seed, folder, settings), log=folder / f"{preset}.log")
    outcome = read(out, preset, seed)
    if code or outcome is None:
        print(f"{preset} seed {seed}: FAILED with code {code}, see {folder / f'{preset}.log'}", flush=True)
        return False
    print(f"{preset} seed {seed}: {outcome} in {time.monotonic() - start:.0f} s, {len(outcome.warnings)} warnings", flush=True)
    return True


def rpp(command: str, seed: int, folder: Path, settings: Sequence[str]) -> list[Any]:
    data = (f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}", f"sft.train={folder / 'sft.jsonl'}")
    return [sys.executable, "-m", "megatron_rpp", command, QUICKSTART / "run.yaml", *data, f"run.seed={seed}", *settings]


def call(command: Sequence[Any], log: Path | None = None) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if log is None:
        return subprocess.run(list(map(str, command)), env=environment, check=True).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(list(map(str, command)), env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def read(out: Path, preset: str, seed: int) -> Outcome | None:
    """What a finished run came to; None where there is none."""
    run_dir = out / f"seed{seed}" / preset
    metrics = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else []
    evaluations = [record for record in records if record["kind"] == "eval"]
    steps = [record for record in records if record["kind"] == "step"]
    if not steps or not evaluations or evaluations[-1]["step"] != steps[-1]["step"]:
        return None
    times = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    log = out / f"seed{seed}" / f"{preset}.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return Outcome(
        preset,
        seed,
        curve=tuple((record["step"], record["eval/accuracy"]) for record in evaluations),
        response_tokens=steps[-1]["response/tokens_mean"],
        train_s=sum(record["step_s"] for record in times if record["kind"] == "step"),
        warnings=tuple(line for line in lines if "warning" in line.lower()),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each preset: held-out accuracy at the end and over the steps, mean and spread over its seeds, and each seed's curve.

    tokens: mean length of the last step's responses. seconds: of training, the median run.
    """
    lines = ["| preset | seeds | steps | final accuracy | mean over the steps | tokens | seconds | warnings | by seed |"]
    lines.append("|" + "---|" * 9)
    for preset in dict.fromkeys(outcome.preset for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.preset == preset]
        cells = (
            f"`{preset}`",
            str(len(own)),
            "/".join(map(str, sorted({one.steps for one in own}))),
            spread([one.accuracy for one in own]),
            spread([one.area for one in own]),
            f"{statistics.fmean(one.response_tokens for one in own):.1f}",
            f"{statistics.median(one.train_s for one in own):.0f}",
            str(sum(len(one.warnings) for one in own)),
            "; ".join(f"{one.seed}: {one}" for one in own),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (of a sample, n - 1); the mean alone where there is one value."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} +- {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


if __name__ == "__main__":
    sys.exit(main())
