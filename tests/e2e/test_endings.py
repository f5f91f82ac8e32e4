"""A run that finds nothing to learn from, whose directory is removed or whose checkpoint is hostile, ends with one error that says so."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from pathlib import Path

import pytest

from tests.e2e import runs
from tests.mcore.damaged import Payload

# A response of one token is truncated, unless the token is the end of the response.
EMPTY = ("algo.filter_truncated=true", "rollout.max_response_tokens=1", "run.max_empty_steps=2")
QUICK = ("parallel.tp=1", "eval.every=0", "checkpoint.every=0")


@pytest.fixture(scope="module")
def empty(yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Finished:
    """Two steps of which nothing is left, and a checkpoint of the second."""
    return runs.train(yaml, tmp_path_factory.mktemp("runs") / "empty", *EMPTY, *QUICK)


def test_empty_steps_are_skipped_until_there_are_too_many(empty: runs.Finished) -> None:
    assert empty.code == 1, empty.output
    assert "Traceback" not in empty.output
    assert "step 1 is skipped" in empty.output
    assert "step 2: too many steps in a row left no token to learn from; a checkpoint of step 2 is written" in empty.output
    assert "run.max_empty_steps" in empty.output
    assert empty.column("batch/empty_steps") == [1, 1]
    assert empty.column("policy/skipped_minibatches") == [2, 2]
    assert empty.column("policy/grad_norm") == [0.0, 0.0]


def test_a_run_that_resumes_after_empty_steps_takes_other_prompts(empty: runs.Finished, yaml: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(empty.dir, tmp_path / "resumed")
    (run_dir / "checkpoints" / "step-000002.bak").mkdir()
    resumed = runs.train(yaml, run_dir, *EMPTY, *QUICK, "run.max_empty_steps=1")
    assert resumed.code == 1, resumed.output
    assert "going on from step 2" in resumed.output
    assert f"warning: {run_dir}/checkpoints holds step-000002.bak" in resumed.output
    assert "step 3: too many steps in a row" in resumed.output
    assert [record["step"] for record in resumed.records("step")] == [1, 2, 3]


def test_a_checkpoint_that_carries_code_is_refused_before_an_engine_starts(empty: runs.Finished, yaml: Path, tmp_path: Path) -> None:
    run_dir, marker = shutil.copytree(empty.dir, tmp_path / "hostile"), tmp_path / "marker"
    policy = run_dir / "checkpoints" / "step-000002" / "policy"
    listed = pickle.loads((policy / ".metadata").read_bytes())
    listed.planner_data = Payload(marker)
    content = pickle.dumps(listed)
    (policy / ".metadata").write_bytes(content)
    files = json.loads((policy / "files.json").read_text())
    files[".metadata"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (policy / "files.json").write_text(json.dumps(files))
    before = {path: path.read_bytes() for path in (run_dir / "config.yaml", run_dir / "metrics.jsonl")}
    for words in ((f"run.dir={run_dir}", *EMPTY), (f"run.dir={tmp_path / 'fresh'}", f"model.megatron_checkpoint={policy}")):
        code, output = runs.rpp("train", str(yaml), *words, *QUICK)
        assert code == 1, output
        assert f"{policy}/.metadata: a pickle in it names an object that is not data" in output
        assert "Traceback" not in output
        assert "engine-0" not in output
        assert not marker.exists()
    assert before == {path: path.read_bytes() for path in before}


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
