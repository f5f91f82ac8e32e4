"""What a run finds in its directory when it starts: its own checkpoints, another run's, responses of weights that are gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.load import dump
from megatron_rpp.config.schema import Config, Data, Model, Run
from megatron_rpp.errors import CheckpointError
from megatron_rpp.observe.rundir import RunDir
from megatron_rpp.process import step_to_resume
from megatron_rpp.resume import (
    RunState,
    begin_save,
    commit_save,
    complete_steps,
    drop_later,
    read_state,
    settings_digest,
    stray_entries,
)


def save(root: Path, step: int, *, digest: str = "d", keep: int = 2) -> Path:
    root.mkdir(exist_ok=True)
    (begin_save(root, step) / "policy").mkdir()
    return commit_save(root, RunState(step, {}, digest), keep=keep)


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        save(tmp_path, step)
    assert complete_steps(tmp_path) == [6, 9]


def test_a_run_that_starts_anew_is_not_taken_for_the_one_before_it(tmp_path: Path) -> None:
    """Two checkpoints are kept, two are there, and the new run's are of earlier steps."""
    for step in (10, 20):
        save(tmp_path, step, digest="old")
    save(tmp_path, 3, digest="new")
    assert complete_steps(tmp_path) == [3]
    final = save(tmp_path, 3, digest="newer")
    assert '"newer"' in (final / "state.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_entries_of_other_names_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for name in ("step-000004.bak", "step-", "step-x", "step-4", "step-\u0664", "notes"):
        (tmp_path / name).mkdir()
    for name in ("step-000099", ".partial-step-000007", "step-000005.tar"):
        (tmp_path / name).write_text("a file")
    strays = stray_entries(tmp_path)
    assert complete_steps(tmp_path) == [4]
    assert len(strays) == 9
    assert "step-000004" not in strays
    save(tmp_path, 1234567)  # more digits than names are padded to
    assert complete_steps(tmp_path) == [4, 1234567]
    assert stray_entries(tmp_path) == strays


def test_a_run_directory_that_was_removed_does_not_come_back_with_a_save(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        begin_save(tmp_path / "run" / "checkpoints", 3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: [], "the checkpoint's state is malformed"),
        (lambda state: None, "the checkpoint's state is malformed"),
        (lambda state: {**state, "step": "4"}, "got: step: '4'"),
        (lambda state: {**state, "step": True}, "got: step: True"),
        (lambda state: {**state, "step": -4}, "got: step: -4"),
        (lambda state: {**state, "step": 5}, "of another step than its directory"),
        (lambda state: {**state, "prompts": []}, r"got: prompts: \[\]"),
        (lambda state: {**state, "digest": None}, "got: digest: None"),
        (lambda state: {**state, "kl_coef": float("nan")}, "got: NaN is not a JSON number"),
        (lambda state: {**state, "kl_coef": "0.1"}, "got: kl_coef: '0.1'"),
        (lambda state: {**state, "x": 1}, "the checkpoint's state is malformed"),
        (lambda state: {"step": 4}, "got: prompts: None"),
    ],
)
def test_a_state_of_wrong_types_names_the_entry(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    where = save(tmp_path, 4)
    state = json.loads((where / "state.json").read_text())
    assert read_state(where) == RunState(4, {}, "d")
    (where / "state.json").write_text(json.dumps(change(state)))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_state(where)
    assert "state.json" in str(caught.value) and "to continue from the one before" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**6, "\0", '{"step": 1e999999999, "step": }', "\ud800"])
def test_a_state_that_is_not_json_is_one_error(text: str, tmp_path: Path) -> None:
    where = save(tmp_path, 4)
    (where / "state.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="state cannot be read") as caught:
        read_state(where)
    assert len(str(caught.value).splitlines()) < 5


def test_responses_of_weights_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    """Resumed at 6: step 7 was sampled with the weights of step 6, which are back; 8, and the evaluation of 7, were not."""
    folder = tmp_path / "digest"
    folder.mkdir()
    names = ("step-000006", "step-000007", "step-000007.1", "step-000008", "eval-000006.ab12", "eval-000007.ab12", "eval-000010.ab12")
    for name in names:
        (folder / f"{name}.leader-0.jsonl").write_text("{}\n")
    drop_later(tmp_path, 6)
    left = sorted(path.name.removesuffix(".leader-0.jsonl") for path in folder.iterdir())
    assert left == ["eval-000006.ab12", "step-000006", "step-000007", "step-000007.1"]


def test_a_checkpoint_of_other_settings_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    cfg = Config(model=Model(hf=Path("/m")), data=Data(train=Path("/d")), run=Run(dir=tmp_path, steps=9))
    where = RunDir(tmp_path)
    assert step_to_resume(cfg, where) == 0
    save(where.checkpoints, 5, digest=settings_digest(asdict(cfg)))
    assert step_to_resume(cfg, where) == 5
    assert step_to_resume(replace(cfg, run=replace(cfg.run, steps=20)), where) == 5
    assert step_to_resume(replace(cfg, run=replace(cfg.run, resume="never")), where) == 0
    with pytest.raises(CheckpointError, match="belongs to a run with other settings") as caught:
        step_to_resume(replace(cfg, optim=replace(cfg.optim, lr=2e-6)), where)
    assert str(where.config) in str(caught.value)
    assert caught.value.got.startswith("digest ")  # config.yaml is not there
    where.write_text("config.yaml", dump(cfg))
    other = replace(cfg, optim=replace(cfg.optim, lr=2e-6), algo=replace(cfg.algo, reward_clip=None), run=replace(cfg.run, steps=20))
    with pytest.raises(CheckpointError) as caught:
        step_to_resume(other, where)
    assert caught.value.got == "algo.reward_clip: (-10.0, 10.0), now None; optim.lr: 1e-06, now 2e-06"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        step_to_resume(replace(cfg, run=Run(dir=tmp_path / "other", resume="must")), RunDir(tmp_path / "other"))
