"""`rpp score`: a verdict or a reason for every line, in order, and never a traceback."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest

from megatron_rpp.errors import DataError, RewardError
from megatron_rpp.reward import score_file

HOSTILE = "tests.unit.reward.hostile:obey"


def run(tmp_path: Path, *options: str, lines: list[object]) -> tuple[int, str]:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    parser = argparse.ArgumentParser()
    score_file.add_arguments(parser)
    out = io.StringIO()
    status = score_file.run(parser.parse_args(["--input", str(path), *options]), out)
    return status, out.getvalue()


def row(response: str, answer: object = "4") -> dict[str, object]:
    return {"prompt": "2+2=", "response": response, "answer": answer}


def test_json_gives_one_line_for_each_row_in_order(tmp_path: Path) -> None:
    status, out = run(tmp_path, "--reward", "arithmetic", "--json", lines=[row(f"= {number % 5}") for number in range(200)])
    assert [json.loads(line) for line in out.splitlines()] == [
        {"line": number + 1, "score": float(number % 5 == 4)} for number in range(200)
    ]
    assert status == 0


def test_bad_rows_and_failed_verifiers_are_reported_by_line(tmp_path: Path) -> None:
    lines = [
        row("1"),
        b"{oops",
        b"",
        [1],
        {"response": "1"},
        {"response": 1, "answer": "4"},
        b'{"response": "\xff"}',
        row("exit"),
        row("sleep"),
        row("0.5"),
    ]
    status, out = run(tmp_path, "--reward", HOSTILE, "--json", "--timeout-s", "0.5", lines=lines)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"line": 1, "score": 1.0},
        {"line": 2, "bad_row": "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"},
        {"line": 4, "bad_row": "a JSON list, expected an object"},
        {"line": 5, "bad_row": "field 'answer' is missing"},
        {"line": 6, "bad_row": "'response' is of type int, expected text"},
        {"line": 7, "bad_row": "not UTF-8 (byte 15 of the line)"},
        {"line": 8, "score": 0.0, "reward_failed": "crash", "reason": "the verifier's process ended: exit code 42"},
        {"line": 9, "score": 0.0, "reward_failed": "timeout", "reason": "no score within 0.5 s; the verifier was killed"},
        {"line": 10, "score": 0.5},
    ]
    assert status == 1


def test_the_table_lists_the_troubles_and_the_mean(tmp_path: Path) -> None:
    lines = [row("1"), row("0"), b"{oops", row("exit"), row("1"), *[b"[]"] * 20]
    status, out = run(tmp_path, "--reward", HOSTILE, lines=lines)
    table = out.splitlines()
    assert table[0].startswith("line      3  bad row: not JSON")
    assert table[1] == "line      4  crash: the verifier's process ended: exit code 42"
    assert table[20:] == [
        "... and 2 more; --json lists all",
        "rows scored  4",
        "rows failed  1",
        "bad rows     21",
        "mean score   0.5000",
    ]
    assert status == 1


def test_number_answers_are_read_as_numbers(tmp_path: Path) -> None:
    _, out = run(
        tmp_path, "--reward", "arithmetic", "--json", lines=[row("4", 4.0), row("1234567", 1234567.0), row("4.5", 4.5), row("4", True)]
    )
    assert [json.loads(line).get("score") for line in out.splitlines()] == [1.0, 1.0, 1.0, None]


def test_prompt_end_comes_from_the_row_or_else_from_the_flag(tmp_path: Path) -> None:
    lines = [
        row("4"),
        {**row("4"), "prompt_end": ""},
        {**row("4"), "prompt_end": "<think>"},
        row("so</think>4"),
        {**row("4"), "prompt_end": 1},
    ]
    for reward in ("arithmetic", "exact"):
        _, plain = run(tmp_path, "--reward", reward, "--json", lines=lines)
        _, opened = run(tmp_path, "--reward", reward, "--json", "--prompt-end", "<think>\n", lines=lines)
        assert [json.loads(line).get("score") for line in plain.splitlines()] == [1.0, 1.0, 0.0, 1.0, None]
        assert [json.loads(line).get("score") for line in opened.splitlines()] == [0.0, 1.0, 0.0, 1.0, None]
        assert json.loads(opened.splitlines()[-1])["bad_row"] == "'prompt_end' is of type int, expected text"


def test_an_empty_file_has_no_mean(tmp_path: Path) -> None:
    status, out = run(tmp_path, "--reward", "exact", lines=[])
    assert (status, out.splitlines()[-1]) == (0, "mean score   none")


def test_a_missing_file_and_an_unknown_reward_are_clear_errors(tmp_path: Path) -> None:
    arguments = argparse.Namespace(input=tmp_path / "absent.jsonl", reward="math", json=True, timeout_s=10.0, num_workers=1)
    with pytest.raises(DataError, match=r"absent.jsonl: cannot read the file\n  got: no such file"):
        score_file.run(arguments)
    with pytest.raises(RewardError, match="did you mean 'math'"):
        run(tmp_path, "--reward", "maths", lines=[row("4")])


def test_an_answer_that_is_no_finite_number_is_a_bad_row(tmp_path: Path) -> None:
    answers = ["1e999", "-1e999", "NaN", "1e23", "-0.0", "2.50"]
    written = "1" + "0" * 23
    lines = [f'{{"response": "{written}", "answer": {answer}}}'.encode() for answer in answers]
    status, out = run(tmp_path, "--reward", "exact", "--json", lines=lines)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert [row.get("bad_row", row.get("score")) for row in rows] == [
        "'answer' is inf, which is not a finite number",
        "'answer' is -inf, which is not a finite number",
        "not JSON: NaN is not a JSON number",
        1.0,
        0.0,
        0.0,
    ]
