"""Train the quickstart's task with several presets and seeds, and write the table of docs/experiments.md.

    python tools/reproduce_presets.py                                       # every preset, seed 0
    python tools/reproduce_presets.py --presets grpo ppo --seeds 0 1 2 --out build/presets -- parallel.tp=1
    python tools/reproduce_presets.py --out build/presets --table           # the table of what has been run, nothing else

For each seed a model and its problems are made and warmed up once; each preset starts from that model. Every run is the
product's own: `rpp train examples/quickstart/run.yaml preset=...`. What follows `--` goes to every run. A run that stands
complete in the output directory is not repeated, so a call that was cut off goes on. A run that fails or warns is told and
shows in the table. Exit status 1 when one failed.
"""

from __future__ import annotations

import argparse
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


@dataclass(frozen=True)
class Outcome:
    """accuracies: on the held-out problems, before the first step, on the way, after the last. warnings: lines of the log that warn."""

    preset: str
    seed: int
    accuracies: tuple[float, ...]
    steps: int
    train_s: float
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return " -> ".join(f"{accuracy:.3f}" for accuracy in self.accuracies)


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = parse(list(sys.argv[1:] if arguments is None else arguments))
    failed = 0
    if not options.table:
        for seed in options.seeds:
            warm_up(options.out, seed, overrides)
            for preset in options.presets:
                failed += not train(options.out, preset, seed, (f"run.steps={options.steps}", *overrides))
    outcomes = [outcome for preset in PRESETS for seed in range(100) if (outcome := read(options.out, preset, seed)) is not None]
    print(table(outcomes))
    return 1 if failed else 0


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "presets")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def warm_up(out: Path, seed: int, overrides: Sequence[str]) -> None:
    """The model that every preset of a seed starts from, made once."""
    folder = out / f"seed{seed}"
    if (folder / "warm" / "config.json").is_file():
        return
    call([sys.executable, QUICKSTART / "make_assets.py", folder, "--seed", str(seed)])
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
    steps = [record["step"] for record in records if record["kind"] == "step"]
    if not steps or not evaluations or evaluations[-1]["step"] != steps[-1]:
        return None
    times = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    log = out / f"seed{seed}" / f"{preset}.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return Outcome(
        preset,
        seed,
        accuracies=tuple(record["eval/accuracy"] for record in evaluations),
        steps=steps[-1],
        train_s=sum(record["step_s"] for record in times if record["kind"] == "step"),
        warnings=tuple(line for line in lines if "warning" in line.lower()),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each preset: held-out accuracy before and after, by seed, and the mean of what was gained."""
    lines = ["| preset | steps | held-out accuracy, before -> on the way -> after, by seed | mean gain | seconds | warnings |"]
    lines.append("|---|---|---|---|---|---|")
    for preset in dict.fromkeys(outcome.preset for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.preset == preset]
        by_seed = ", ".join(f"{one.seed}: {one}" for one in own)
        gain = statistics.fmean(one.accuracies[-1] - one.accuracies[0] for one in own)
        seconds = statistics.median(one.train_s for one in own)
        warned = sum(len(one.warnings) for one in own)
        lines.append(f"| `{preset}` | {own[0].steps} | {by_seed} | {gain:+.3f} | {seconds:.0f} | {warned} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
