"""The end of the quickstart: answers before and after training, and one line of numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rpp.display import printable_lines

NUM_SAMPLES = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--total-s", type=float, required=True, help="seconds since the script began")
    options = parser.parse_args()
    evaluations = [record for record in read(options.run_dir / "metrics.jsonl") if record["kind"] == "eval"]
    if len(evaluations) < 2:
        print(f"{options.run_dir}: expected an evaluation before and one after training, got {len(evaluations)}", file=sys.stderr)
        return 1
    first, last = evaluations[0], evaluations[-1]
    show(options.run_dir, first["step"], last["step"])
    train_s = sum(record["step_s"] for record in read(options.run_dir / "timings.jsonl") if record["kind"] == "step")
    print(
        f"quickstart: held-out accuracy {first['eval/accuracy']:.3f} -> {last['eval/accuracy']:.3f}, "
        f"steps {last['step']}, train {train_s:.0f} s, total {options.total_s:.0f} s"
    )
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show(run_dir: Path, first: int, last: int) -> None:
    """Held-out problems whose verdict changed first, since they say most; then others."""
    before = {row["uid"]: row for row in read(run_dir / "eval" / f"step-{first:06d}.jsonl")}
    after = {row["uid"]: row for row in read(run_dir / "eval" / f"step-{last:06d}.jsonl")}
    order = sorted(before, key=lambda uid: (before[uid]["score"] == after[uid]["score"], uid))
    changed = sum(before[uid]["score"] != after[uid]["score"] for uid in before)
    table = Table(title=f"{NUM_SAMPLES} of {len(before)} held-out problems ({changed} verdicts changed)", show_lines=True)
    for heading in ("problem", "answer", f"before (step {first})", f"after (step {last})"):
        table.add_column(heading, overflow="fold")
    for uid in order[:NUM_SAMPLES]:
        texts = (before[uid]["prompt"], before[uid]["answer"], cell(before[uid]), cell(after[uid]))
        table.add_row(*(Text(printable_lines(text, indent=0)) for text in texts))
    Console(width=110).print(table)


def cell(row: dict[str, Any]) -> str:
    mark = "right" if row["score"] >= 1 else "wrong"
    return f"{row['response']}  [{mark}]"


if __name__ == "__main__":
    sys.exit(main())
