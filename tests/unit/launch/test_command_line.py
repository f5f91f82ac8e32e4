"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rpp.__main__ import main
from megatron_rpp.version import __version__
from tests.unit.config.conftest import project, write  # noqa: F401 -- fixtures

ROOT = Path(__file__).resolve().parents[3]


def rpp(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_rpp", *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd or ROOT, env={**plain, "PYTHONPATH": str(ROOT), **env}
    )


def test_check_prints_what_follows_from_the_settings(project: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["check", str(project), "parallel.tp=2", "parallel.pp=2", "algo.minibatches=3"]) == 0
    output = capsys.readouterr()
    assert f"{project}: every setting holds" in output.out
    assert "num ranks                      4" in output.out
    assert "responses per optimiser step   84 to 88" in output.out
    assert output.err == "warning: 64 prompts do not divide into algo.minibatches 3: optimiser steps differ in size\n"


def test_check_prints_what_a_preset_says_and_what_lies_over_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["check", str(project), "preset=dapo", "algo.clip_high=0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  preset dapo                    algo.estimator: grpo" in lines
    assert "  preset dapo                    algo.clip_high: 0.3, over the preset's 0.28" in lines


@pytest.mark.parametrize("command", ["check", "train", "sft", "eval"])
def test_wrong_settings_are_one_message_and_exit_code_2(command: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main([command, str(project), "optim.lrr=1"]) == 2
    assert capsys.readouterr().err == (
        f"rpp {command}: {project}: 1 setting is wrong\n  command line  optim.lrr: unknown setting; did you mean optim.lr?\n"
    )


def test_eval_needs_problems_to_evaluate_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["eval", str(project)]) == 2
    assert "data.eval: required by `rpp eval`" in capsys.readouterr().err


def test_a_run_with_the_wrong_number_of_processes_is_refused_by_every_rank(project: Path) -> None:  # noqa: F811
    place = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = rpp("train", str(project), "parallel.tp=2", **place)
    assert result.returncode == 2
    assert "tp 2 x cp 1 x dp 1 x pp 1 = 2 ranks, but there are 4 processes; parallel.dp: 2 would fit" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_signal_to_save_does_not_end_a_run_that_is_still_starting(project: Path) -> None:  # noqa: F811
    """The model of the fixture has neither weights nor tokenizer, so the run ends by itself, with an error about that."""
    command = [sys.executable, "-m", "megatron_rpp", "train", str(project), f"run.dir={project.parent / 'run'}"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    process = subprocess.Popen(command, cwd=ROOT, env={**plain, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not blocks(process.pid, signal.SIGUSR1):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1, error


def blocks(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigBlk:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("given", "meant"), [("trian", "train"), ("docter", "doctor"), ("evaluate", "eval")])
def test_an_unknown_command_is_met_with_the_likely_one(given: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([given])
    assert caught.value.code == 2
    assert f"unknown command {given!r}; did you mean {meant!r}?" in capsys.readouterr().err


def test_a_command_unlike_any_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["xyzzy"])
    assert "there are train, sft, eval, check, score, doctor" in capsys.readouterr().err


QUIET = """
import sys
from megatron_rpp.__main__ import main
try:
    main([sys.argv[1]])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""


def test_version_and_help_do_not_import_torch() -> None:
    for option in ("--version", "--help"):
        result = subprocess.run([sys.executable, "-c", QUIET, option], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert result.returncode == 0, result.stderr
    assert rpp("--version").stdout == f"megatron_rpp {__version__}\n"


def test_score_reads_a_file_and_judges_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "1+1", "response": "2", "answer": "2"}, {"prompt": "1+1", "response": "3", "answer": "2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["score", "--reward", "exact", "--input", str(tmp_path / "rows.jsonl"), "--json"])
    assert [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()] == [1.0, 0.0]


def test_a_reader_that_leaves_early_is_not_an_error_worth_a_traceback(project: Path) -> None:  # noqa: F811
    script = f"{sys.executable} -u -m megatron_rpp check {project} | true"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "Traceback" not in result.stderr
