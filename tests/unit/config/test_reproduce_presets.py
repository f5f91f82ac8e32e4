"""The table of tools/reproduce_presets.py, from run directories worked out by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("reproduce_presets")


def write_run(folder: Path, preset: str, curve: dict[int, float], *, last_step: int, tokens: float, log: str = "") -> None:
    """The files of a run of `last_step` steps that was evaluated where `curve` says. Every step takes 2 s."""
    run = folder / preset
    run.mkdir(parents=True)
    records = [{"kind": "eval", "step": step, "eval/accuracy": accuracy} for step, accuracy in curve.items()]
    steps = [{"kind": "step", "step": step, "response/tokens_mean": tokens - last_step + step} for step in range(1, last_step + 1)]
    times = [{"kind": "step", "step": step, "step_s": 2.0} for step in range(1, last_step + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*steps, *records]))
    (run / "timings.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*times, {"kind": "eval", "step": 0}]))
    (folder / f"{preset}.log").write_text(log)


def rows(out: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines()]
    return {line[0].strip("`"): line[1:] for line in lines[2:]}


def test_the_table_gives_mean_and_spread_over_seeds_of_the_end_and_of_the_way(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "seed0", "grpo", {0: 0.1, 10: 0.5, 15: 0.9}, last_step=15, tokens=30, log="fine\nWARNING: odd\n")
    write_run(tmp_path / "seed1", "grpo", {0: 0.1, 10: 0.3, 15: 0.7}, last_step=15, tokens=32)
    write_run(tmp_path / "seed0", "rloo", {0: 0.0, 10: 1.0}, last_step=10, tokens=40)
    assert tool.main(["--out", str(tmp_path), "--table"]) == 0
    table = rows(capsys.readouterr().out)
    # areas: (10 x 0.3 + 5 x 0.7) / 15 = 0.4333 and (10 x 0.2 + 5 x 0.5) / 15 = 0.3; their deviation is 0.1333 / sqrt 2
    by_seed = "0: 0.100 -> 0.500 -> 0.900; 1: 0.100 -> 0.300 -> 0.700"
    assert table["grpo"] == ["2", "15", "0.800 +- 0.141", "0.367 +- 0.094", "31.0", "30", "1", by_seed]
    assert table["rloo"] == ["1", "10", "1.000", "0.500", "40.0", "20", "0", "0: 0.000 -> 1.000"]
    assert list(table) == ["grpo", "rloo"]


def test_hard_runs_have_a_folder_and_a_table_of_their_own_and_unfinished_ones_are_left_out(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "seed0", "grpo", {0: 0.5, 10: 1.0}, last_step=10, tokens=30)
    write_run(tmp_path / "hard" / "seed0", "ppo", {0: 0.2, 10: 0.4}, last_step=10, tokens=30)
    write_run(tmp_path / "hard" / "seed1", "ppo", {0: 0.2, 10: 0.4}, last_step=14, tokens=30)
    assert tool.main(["--out", str(tmp_path), "--table", "--hard"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["ppo"]
    assert table["ppo"][-1] == "0: 0.200 -> 0.400"
