"""The metrics file through crashes and resumes, and TensorBoard's view of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.errors import RppError
from megatron_rpp.observe.metrics import encode
from megatron_rpp.observe.sinks import RecordFile, TensorBoard, read


def fill(path: Path, steps: range, resumed_step: int = 0) -> None:
    file = RecordFile(path, encode, resumed_step=resumed_step)
    for step in steps:
        file.append("step", step, {"score/mean": step / 7})
        if step % 2 == 0:
            file.append("eval", step, {"eval/accuracy": step / 3})
    file.close()


def test_a_resumed_run_leaves_the_bytes_of_one_that_never_stopped(tmp_path: Path) -> None:
    fill(tmp_path / "whole.jsonl", range(1, 7))
    fill(tmp_path / "parts.jsonl", range(1, 6))  # killed after step 5, whose last checkpoint is that of step 4
    fill(tmp_path / "parts.jsonl", range(5, 7), resumed_step=4)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("lost", range(1, 40, 6))
def test_a_line_that_a_crash_cut_off_is_gone_after_the_resume(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    fill(path, range(0), resumed_step=3)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])
    fill(path, range(3, 4), resumed_step=3)
    assert path.read_bytes() == whole


def test_a_run_without_a_checkpoint_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(0, 3))
    fill(path, range(0, 1))
    assert [record["step"] for record in read(path)] == [0, 0]  # step and evaluation of 0, once each


WRITER = """
import os, sys
from pathlib import Path
from megatron_rpp.observe.metrics import encode
from megatron_rpp.observe.sinks import RecordFile
RecordFile(Path(sys.argv[1]), encode).append("step", 1, {"score/mean": 0.5})
os.kill(os.getpid(), 9)
"""


def test_a_record_survives_the_death_of_the_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "m.jsonl")], timeout=60)
    assert read(tmp_path / "m.jsonl") == [{"kind": "step", "step": 1, "score/mean": 0.5}]


def test_garbage_inside_the_file_is_named_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\x00\x00\n" + lines[1])
    with pytest.raises(RppError, match=r"metrics\.jsonl:2: not a record of a run"):
        RecordFile(path, encode, resumed_step=2)
    path.write_bytes(lines[0] + b'{"step": "two", "kind": "step"}\n' + lines[1])
    with pytest.raises(RppError, match=r"metrics\.jsonl:2"):
        read(path)


def test_a_file_knows_which_records_it_holds(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "metrics.jsonl", encode)
    file.append("eval", 4, {"eval/accuracy": 0.5})
    assert file.has("eval", 4)
    assert not file.has("eval", 3)
    assert not file.has("step", 4)
    file.close()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_back_every_number_and_forgets_steps_taken_again(tmp_path: Path) -> None:
    for steps, resumed_step, scale in ((range(1, 6), 0, 1.0), (range(4, 6), 3, 2.0)):
        board = TensorBoard(tmp_path, resumed_step=resumed_step)
        for step in steps:
            board.append("step", step, {"score/mean": scale * step, "policy/note": "word"})
        board.close()
    assert scalars(tmp_path, "score/mean") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 8.0), (5, 10.0)]
