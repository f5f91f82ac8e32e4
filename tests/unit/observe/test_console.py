"""What a person reads: rows, progress, and silence on ranks that are not asked."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_rpp.config.schema import Observe
from megatron_rpp.observe.console import HEADING, Plain, Rich, format_row, open_console
from megatron_rpp.observe.log import RunLog
from megatron_rpp.observe.rundir import RunDir
from megatron_rpp.observe.sinks import read

VALUES = {
    "score/mean": 0.5,
    "response/tokens_mean": 123.44,
    "response/truncated_frac": 0.0625,
    "mismatch/mean_abs": 1.5e-6,
    "policy/clip_frac_low": 0.01,
    "policy/clip_frac_high": 0.02,
    "policy/grad_norm": 0.75,
}
TIMING = {"tokens_per_s": 12345.6, "step_s": 3.21}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_row_stands_under_its_heading() -> None:
    assert HEADING == "  step    score  held-out   length   cut %   mismatch  clip %       grad     tok/s   step s"
    assert format_row(7, VALUES, TIMING) == "     7    0.500         -    123.4     6.2   1.50e-06    3.00       0.75    12,346      3.2"
    assert len(format_row(7, VALUES, TIMING)) == len(HEADING)


def test_a_value_that_json_could_not_hold_is_shown_as_missing_not_as_a_crash() -> None:
    assert format_row(1, {"score/mean": "nan"}, {}).split()[1] == "-"


def test_plain_repeats_its_heading_and_speaks_of_progress_rarely() -> None:
    now = 0.0
    stream = io.StringIO()
    console = Plain(stream, clock=lambda: now)
    for done in range(10):
        now += 7.0
        console.progress("roll-out of step 1", done, 10, 100 * done)
    assert stream.getvalue().splitlines() == [
        "        roll-out of step 1: 4/10 responses, 400 tokens",
        "        roll-out of step 1: 9/10 responses, 900 tokens",
    ]
    for step in range(1, 23):
        console.row(step, VALUES, TIMING)
    assert stream.getvalue().count(HEADING) == 2


def test_rich_shows_rows_whole_on_a_narrow_terminal_and_clears_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    console = Rich(stream)
    for done in (1, 2, 3):
        console.progress("roll-out", done, 3, 50 * done)
    console.progress("evaluation", 1, 3, 5)
    console.row(1, VALUES, TIMING)
    console.warn("[bold]brackets are text[/bold]")
    console.close()
    assert format_row(1, VALUES, TIMING) in stream.getvalue()
    assert "[bold]brackets are text[/bold]" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("mode", "stream", "kind"),
    [("auto", Terminal(), Rich), ("auto", io.StringIO(), Plain), ("plain", Terminal(), Plain), ("rich", io.StringIO(), Rich)],
)
def test_the_console_fits_the_stream_unless_told(mode, stream: io.StringIO, kind: type) -> None:
    assert type(open_console(mode, stream=stream)) is kind


def test_only_rank_0_speaks_and_off_leaves_warnings() -> None:
    for mode, is_leader, expected in (("plain", False, ""), ("off", False, ""), ("off", True, "warning: look\n")):
        stream = io.StringIO()
        console = open_console(mode, is_leader=is_leader, stream=stream)
        console.say("hello")
        console.row(1, VALUES, TIMING)
        console.progress("x", 1, 2, 3)
        console.warn("look")
        console.close()
        assert stream.getvalue() == expected


def test_a_log_records_shows_and_sums_up(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    observe = Observe(tensorboard=False, console="plain")
    with RunDir.open(tmp_path) as run, RunLog(observe, run) as log, RunLog(observe, None) as other_rank:
        for one in (log, other_rank):
            one.evaluation(0, {"eval/accuracy": 0.25, "eval/num_prompts": 8})
            one.step(1, VALUES, timing=TIMING)
            one.step(2, VALUES | {"score/mean": 0.75}, timing=TIMING)
            one.sft(1, 1, {"sft/loss": 2.5})
        assert log.summary()["score/mean"] == 0.75
        assert other_rank.summary() == {}
        assert (log.has("eval", 0), other_rank.has("eval", 0)) == (True, False)
    assert [(record["kind"], record["step"]) for record in read(run.metrics)] == [("eval", 0), ("step", 1), ("step", 2), ("sft", 1)]
    assert read(run.timings) == [{"kind": "step", "step": step, **TIMING} for step in (1, 2)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "     0  held-out accuracy 0.2500 on 8 prompts"
    assert [line.split()[2] for line in lines[2:4]] == ["0.250", "-"]  # a row shows the evaluation since the row before
    assert lines[4] == "     1/1  loss 2.5"


def test_a_resumed_run_says_which_records_are_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observe = Observe(console="off", tensorboard=False)
    with RunDir.open(tmp_path) as run, RunLog(observe, run) as log:
        for step in (1, 2, 5):
            log.step(step, VALUES, timing=TIMING if step < 5 else {})
    with RunDir.open(tmp_path) as run, RunLog(observe, run, resumed_step=5) as log:
        log.step(6, VALUES, timing=TIMING)
    rest = "The run continues after step 5 without what is lost"
    assert capsys.readouterr().out.splitlines() == [
        f"warning: metrics.jsonl has no record of steps 3-4. {rest}",
        f"warning: timings.jsonl has no record of steps 3-5. {rest}",
    ]
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2, 5, 6]


def test_a_warning_that_is_to_be_said_once_is_said_once_by_the_first_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observe = Observe(console="plain", tensorboard=False)
    with RunDir.open(tmp_path) as run, RunLog(observe, run) as log, RunLog(observe, None) as other_rank:
        for step in range(1, 4):
            for each in (log, other_rank):
                each.warn(f"step {step}: odd", once="odd")
                each.warn(f"step {step}: always")
    said = [f"warning: step {step}: always" for step in (1, 2, 3)]
    assert capsys.readouterr().out.splitlines() == ["warning: step 1: odd", *said]
