"""A run that finds nothing to learn from, or whose directory is removed, ends with one error that says so."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e import runs

# A response of one token is truncated, unless the token is the end of the response.
EMPTY = ("algo.filter_truncated=true", "rollout.max_response_tokens=1", "run.max_empty_steps=2")
QUICK = ("parallel.tp=1", "eval.every=0", "checkpoint.every=0")


def test_empty_steps_are_skipped_until_there_are_too_many_and_a_resumed_run_takes_other_prompts(yaml: Path, tmp_path: Path) -> None:
    run = runs.train(yaml, tmp_path / "empty", *EMPTY, *QUICK)
    assert run.code == 1, run.output
    assert "Traceback" not in run.output
    assert "step 1 is skipped" in run.output
    assert "step 2: too many steps in a row left no token to learn from; a checkpoint of step 2 is written" in run.output
    assert "run.max_empty_steps" in run.output
    assert run.column("batch/empty_steps") == [1, 1]
    assert run.column("policy/skipped_minibatches") == [2, 2]
    assert run.column("policy/grad_norm") == [0.0, 0.0]
    (run.dir / "checkpoints" / "step-000002.bak").mkdir()
    resumed = runs.train(yaml, run.dir, *EMPTY, *QUICK, "run.max_empty_steps=1")
    assert resumed.code == 1, resumed.output
    assert "going on from step 2" in resumed.output
    assert f"warning: {run.dir}/checkpoints holds step-000002.bak" in resumed.output
    assert "step 3: too many steps in a row" in resumed.output
    assert [record["step"] for record in resumed.records("step")] == [1, 2, 3]


def test_a_run_whose_directory_is_removed_ends_with_one_error_and_does_not_make_it_anew(yaml: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "removed"
    with runs.training(yaml, run_dir, *QUICK, "run.steps=500") as process:
        runs.await_record(run_dir, 1, process)
        shutil.rmtree(run_dir)
        assert process.wait(timeout=60) == 1
    output = run_dir.with_suffix(".out").read_text()
    assert output.count("rpp train: ") == 1, output
    assert "Traceback" not in output
    assert str(run_dir) in output.partition("rpp train: ")[2]
    assert not run_dir.exists()
