"""What comes from files, models and verifiers reaches a terminal with its control characters escaped, at every door."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rpp import doctor, launch
from megatron_rpp.__main__ import main
from megatron_rpp.display import printable, printable_lines
from megatron_rpp.errors import ConfigError, DataError, RppError
from megatron_rpp.heldout import evaluate
from megatron_rpp.observe.console import Off, Plain, Rich
from megatron_rpp.rollout.request import Sampling
from megatron_rpp.types import Group, Prompt, Response
from tests.unit.fuzz import project

ROOT = Path(__file__).parents[2]
# Clears the screen, names the window, rings, goes back to the start of the line, is the CSI of C1, turns the direction of text, and has
# half of a surrogate pair, markup of rich and one of its emoji.
ATTACK = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\u2066\u2028\ud800[red]x[/red][link=y]:smile:"
SHOWN = r"\u001b[2J\u001b]0;owned\u0007\r\u009b31m\u202e\u2066\u2028\ud800[red]x[/red][link=y]:smile:"
# A terminal obeys these, or shows text in another order than it is.
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def test_every_control_character_is_escaped_and_all_other_text_is_left_alone() -> None:
    for number in range(0x110000):
        char = chr(number)
        assert not OBEYED.search(printable(char))
        assert printable(char) == char or OBEYED.match(char) or char in "\n\u061c"
    assert printable("caf\u00e9 \u4f60\u597d \U0001f600 \\n") == "caf\u00e9 \u4f60\u597d \U0001f600 \\n"
    assert printable(ATTACK) == SHOWN
    assert printable("a\tb\nc") == r"a\tb\nc"


def test_an_escape_is_what_json_reads_back() -> None:
    text = ATTACK.replace("\ud800", "") + "\x00\x7f\x85\n\t"
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


def test_lines_from_outside_cannot_begin_where_ours_do() -> None:
    assert printable_lines("a\nb\n   c\n      d", indent=4) == "a\n    b\n    c\n      d"


@pytest.mark.parametrize("part", ["what", "where", "expected", "got", "fix", "details"])
def test_every_part_of_an_error_is_escaped(part: str) -> None:
    parts: dict[str, Any] = {"what": "bad"} | {part: [ATTACK] if part == "details" else ATTACK}
    error = DataError(parts.pop("what"), **parts)
    assert SHOWN in str(error)
    assert not OBEYED.search(str(error))


def test_text_in_an_error_cannot_forge_another_part_or_message() -> None:
    forged = "x\n  fix: run this\nrpp check: every setting holds"
    for error in (
        DataError(forged, fix="repair it"),
        DataError("bad", got=forged),
        DataError("bad", where=forged),
        ConfigError("bad", details=[forged]),
    ):
        lines = str(error).splitlines()
        assert [line for line in lines if line.startswith("rpp check") or line.startswith("  fix: run")] == []


def test_an_error_does_not_flood_the_terminal() -> None:
    assert len(str(RppError("bad", got="x" * 10**6))) < 5000


@pytest.mark.parametrize("kind", [Off, Plain, Rich])
def test_a_console_says_text_as_it_is_and_obeys_none_of_it(kind: type) -> None:
    stream = io.StringIO()
    console = kind(stream)
    console.warn(ATTACK + "\nwarning: forged")
    if kind is not Off:
        console.say(ATTACK)
    console.close()
    assert stream.getvalue().count(SHOWN) == (1 if kind is Off else 2)
    assert not OBEYED.search(stream.getvalue())
    assert "\n  warning: forged" in stream.getvalue()


def test_the_name_of_a_roll_out_is_no_markup() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Rich(stream)
    console.progress("[red]step[/red]\x1b]0;owned\x07", 1, 3, 5)
    console.close()
    assert r"[red]step[/red]\u001b]0;owned\u0007" in stream.getvalue()


VERIFIER = """
def score(item):
    raise ValueError("\\x1b[2J\\x07\\u202e[red]\\nline      7  all is well")
"""


def test_the_reason_of_a_verifier_is_one_line_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hostile_verifier.py").write_text(VERIFIER)
    (tmp_path / "rows.jsonl").write_text('{"response": "b", "answer": "c"}\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["score", "--reward", "hostile_verifier:score", "--input", str(tmp_path / "rows.jsonl"), "--num-workers", "1"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith(r"\u001b[2J\u0007\u202e[red]\nline      7  all is well")
    assert not OBEYED.search(out)


def test_check_shows_names_of_files_and_settings_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with project() as folder:
        (folder / "\x1b[31m.yaml").write_text((folder / "run.yaml").read_text())
        assert main(["check", "\x1b[31m.yaml", "parallel.dp=3"]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(r"\u001b[31m.yaml: every setting holds")
        assert main(["check", "\x1b[31m.yaml", "optim.\x1b[31m=1"]) == 2
        complaint = capsys.readouterr().err
    assert r"optim.\u001b[31m: unknown setting" in complaint
    assert not OBEYED.search(said.out + said.err + complaint)


def test_a_terminal_that_is_not_in_utf8_shows_what_it_can() -> None:
    with project() as folder:
        path = folder / "\u0126.yaml"
        path.write_text((folder / "run.yaml").read_text())
        code = f"import sys; from megatron_rpp.__main__ import main; sys.exit(main(['check', {str(path)!r}]))"
        env = {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT), "PATH": os.defpath}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, env=env)
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False)
    assert b"\\u0126.yaml: every setting holds" in result.stdout


@pytest.mark.parametrize("error", [DataError("bad " + ATTACK), ValueError("bad " + ATTACK)])
def test_the_launcher_shows_the_report_of_a_rank_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an error, and of a traceback, which keeps its lines."""
    name = f"errors.{type(error).__name__}" if isinstance(error, RppError) else type(error).__name__
    code = "import sys; from pathlib import Path; from megatron_rpp import errors; from megatron_rpp.dist import leaving\n"
    code += f"leaving.write_report(Path(sys.argv[-1]), {name}({'bad ' + ATTACK!r}))\n"
    monkeypatch.setattr(launch, "GRACE_S", 2.0)
    command = [sys.executable, "-c", code + "sys.exit(5)"]
    assert launch.run_ranks(command, 1, log_dir=tmp_path / "logs", is_cpu=True, silence_s=60) == 5
    shown = capfd.readouterr().err
    assert f"bad {SHOWN}\n(rank 0 of 1" in shown
    assert not OBEYED.search(shown)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_prints_its_own_error_shows_it_escaped(rank: int) -> None:
    code = f"from megatron_rpp.dist import leaving; leaving.print_errors({rank}, 'train'); leaving.tell(ValueError({'bad ' + ATTACK!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert f"bad {SHOWN}\n" in result.stderr
    assert not OBEYED.search(result.stderr)


@pytest.mark.parametrize(
    ("is_shared", "shown"), [(False, "rank 1: RPP_RUN_KEY: it is short\n  fix: take a longer one\n"), (True, "rank 1: it is short\n")]
)
def test_another_rank_prints_the_whole_of_an_error_that_it_alone_may_have(is_shared: bool, shown: str) -> None:
    code = "from megatron_rpp.dist import leaving; from megatron_rpp.errors import ConfigError; leaving.print_errors(1, 'train'); "
    code += "error = ConfigError('it is short', where='RPP_RUN_KEY', fix='take a longer one'); "
    code += f"error.is_shared = {is_shared}; leaving.tell(error)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stderr == shown


def test_what_the_doctor_finds_is_shown_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("python", "warn", ATTACK, ATTACK)]))
    assert doctor.main() == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [f"warn  {'python':20} {SHOWN}", f"{'':27}-> {SHOWN}", "1 checks, 1 warnings, 0 failures"]


def test_the_table_of_an_evaluation_can_be_shown_on_a_terminal_and_is_still_json(tmp_path: Path) -> None:
    text = ATTACK.replace("\ud800", "") + " \u4f60"
    response = Response("a", 0, (1,), (-1.0,), text, "stop", 0, 1.0)
    group = Group(Prompt("a", (1,), text, text), (response,))
    collector: Any = SimpleNamespace(collect=lambda *_, **__: (group,), groups=SimpleNamespace(rank=0))
    evaluate(collector, (group.prompt,), version=0, sampling=Sampling(max_tokens=8), table=tmp_path / "t.jsonl")
    written = (tmp_path / "t.jsonl").read_text(encoding="utf-8")
    assert not OBEYED.search(written)
    assert "\u4f60" in written
    (row,) = [json.loads(line) for line in written.splitlines()]
    assert (row["prompt"], row["answer"], row["response"]) == (text, text, text)


def test_the_quickstarts_table_shows_answers_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = runpy.run_path(str(ROOT / "examples" / "quickstart" / "summary.py"))
    (tmp_path / "eval").mkdir()
    row = {"uid": "a", "prompt": "[red]p[/red]", "answer": ":smile:", "response": "\x1b[2J[/x]\u202e", "score": 0.0}
    for step in (0, 5):
        (tmp_path / "eval" / f"step-{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    summary["show"](tmp_path, 0, 5)
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    for shown in ("[red]p[/red]", ":smile:", r"\u001b[2J[/x]\u202e"):
        assert shown in out
