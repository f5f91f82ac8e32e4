"""The metrics file through crashes and resumes, and TensorBoard's view of it."""

from __future__ import annotations

import os
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


def lines(*steps: int) -> bytes:
    return b"".join(encode("step", step, {"score/mean": step / 7}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("before", "resumed_step", "kept", "warnings"),
    [
        ((1, 2, 3), 3, (1, 2, 3), []),
        ((1, 2, 3, 4, 5), 3, (1, 2, 3), []),
        ((1, 2, 5), 5, (1, 2, 5), ["no record of steps 3-4. The run continues after step 5"]),
        ((2, 4, 6, 7), 6, (2, 4, 6), ["no record of steps 1, 3, 5. "]),
        ((1, 2, 3), 4, (1, 2, 3), ["no record of step 4. "]),
        ((), 5, (), ["no record of steps 1-5. "]),
        ((1, 2, 2, 3), 3, (1, 2, 2, 3), ["more than one record of step 2"]),
        ((1, 3, 2), 3, (1, 3, 2), ["the record of step 2 after that of a later step"]),
        ((1, 2, 5, 3, 4), 4, (1, 2, 3, 4), ["the record of step 3 after that of a later step"]),
        (
            (1, 9, 1),
            2,
            (1, 1),
            ["no record of step 2", "more than one record of step 1", "the record of step 1 after that of a later step"],
        ),
        ((4, 5), 0, (), []),
        ((4, 5), -1, (), []),
    ],
)
def test_records_that_are_missing_doubled_or_out_of_order_are_named(
    tmp_path: Path, before: tuple[int, ...], resumed_step: int, kept: tuple[int, ...], warnings: list[str]
) -> None:
    """The run continues: it needs none of them. No step that will be taken again keeps its record."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(*before))
    file = RecordFile(path, encode, resumed_step=resumed_step)
    file.append("step", 9, {"score/mean": 9 / 7})
    file.close()
    assert path.read_bytes() == lines(*kept, 9)
    assert len(file.warnings) == len(warnings)
    for given, expected in zip(file.warnings, warnings, strict=True):
        assert given.startswith("metrics.jsonl has ")
        assert expected in given
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_is_no_second_record_of_its_step(tmp_path: Path) -> None:
    fill(tmp_path / "metrics.jsonl", range(1, 5))
    assert RecordFile(tmp_path / "metrics.jsonl", encode, resumed_step=4).warnings == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"kind": "step", "step": 2.0}', "the step is not a whole number"),
        (b'{"kind": "step", "step": true}', "the step is not a whole number"),
        (b'{"kind": "step", "step": -1}', "the step is not a whole number"),
        (b'{"kind": "step", "step": 1' + b"0" * 400 + b"}", "the step is not a whole number"),
        (b'{"kind": 5, "step": 2}', "the kind is not a word"),
        (b'{"step": 2}', "the kind is not a word"),
        (b'{"kind": "step", "step": 2, "score/mean": [1]}', "'score/mean' is not a number or a word"),
        (b'{"kind": "step", "step": 2, "score/mean": null}', "'score/mean' is not a number or a word"),
        (b'{"kind": "step", "step": 2, "score/mean": Infinity}', "Infinity is not a JSON number"),
        (b'{"kind": "step", "step": 2, "step": 3}', "the name 'step' is given twice"),
        (b"[1]", "a list, not an object"),
        (b"[" * 100_000, "nested more than"),
        (b"\xff", "not UTF-8"),
        (lines(2)[:-20], "Expecting value"),  # torn, in the middle of the file
    ],
)
def test_a_line_that_no_run_wrote_is_refused_with_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "timings.jsonl"
    path.write_bytes(lines(1) + line + b"\n" + lines(3))
    with pytest.raises(RppError) as caught:
        RecordFile(path, encode, resumed_step=3)
    assert f"{path}:2: not a record of a run" in str(caught.value)
    assert reason in str(caught.value)
    assert path.read_bytes() == lines(1) + line + b"\n" + lines(3)  # nothing is lost by a refusal


@pytest.mark.parametrize("resumed_step", [0, 3])
def test_a_pipe_in_place_of_the_records_does_not_block_a_run(tmp_path: Path, resumed_step: int) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RppError, match="cannot read the records of the run\n  got: a named pipe"):
        RecordFile(tmp_path / "metrics.jsonl", encode, resumed_step=resumed_step)


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
