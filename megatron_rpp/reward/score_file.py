"""`rpp score`: judge the responses of a JSONL file with a reward, in order, without a model.

A row is an object {"prompt", "response", "answer", "prompt_end"}; prompt may be left out, answer may be a number.
prompt_end is what the chat template wrote after the user's message, such as "<|im_start|>assistant\\n<think>\\n". A
thought that it opens and the response never closes has no answer. `--prompt-end TEXT` is given to rows without one.
With `--json` one line comes out for each line that went in: {"line", "score"}, with "reward_failed" and "reason" when
the verifier gave no score, or {"line", "bad_row": why}. Without it: a table of the rows that did not score, and the
mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_rpp.config.ranges import flag_type
from megatron_rpp.data.rows import BadRow, iter_jsonl, number_text
from megatron_rpp.display import printable
from megatron_rpp.errors import DataError
from megatron_rpp.input_file import why_unreadable
from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.pool import RewardPool

MAX_LISTED = 20
_FIELDS = ("prompt", "response", "answer", "prompt_end")
_AHEAD = 64  # rows in flight: enough to keep the workers busy, few enough to stream a file of any length


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of one line: a verdict, or why it is not a row."""

    line: int
    verdict: Verdict | None
    bad_row: str = ""

    @property
    def is_trouble(self) -> bool:
        return self.verdict is None or self.verdict.reward_failed is not None

    @property
    def trouble(self) -> str:
        return f"bad row: {self.bad_row}" if self.verdict is None else f"{self.verdict.reward_failed}: {self.verdict.reason}"

    def as_json(self) -> str:
        if self.verdict is None:
            return json.dumps({"line": self.line, "bad_row": self.bad_row})
        fields: dict[str, object] = {"line": self.line, "score": self.verdict.score}
        if self.verdict.reward_failed:
            fields |= {"reward_failed": self.verdict.reward_failed, "reason": self.verdict.reason}
        return json.dumps(fields)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward", required=True, metavar="NAME", help="exact, arithmetic, math or package.module:function")
    parser.add_argument("--input", required=True, type=Path, metavar="FILE.jsonl", help="rows {prompt, response, answer, prompt_end}")
    parser.add_argument(
        "--prompt-end",
        default="",
        metavar="TEXT",
        help="what the chat template wrote after the user's message, for rows without a prompt_end; after '<think>' a "
        "response has no answer until it writes </think> (default: nothing)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line for each row instead of a table")
    add_pool_arguments(parser, timeout_s=10.0)


def add_pool_arguments(parser: argparse.ArgumentParser, *, timeout_s: float) -> None:
    """The flags of a command that opens a RewardPool. timeout_s: the default."""
    limit = flag_type("reward.timeout_s", float)
    parser.add_argument("--timeout-s", type=limit, default=timeout_s, help=f"wall clock of one verifier call (default {timeout_s:g})")
    parser.add_argument("--num-workers", type=flag_type("reward.num_workers", int), default=2, help="verifier processes (default 2)")


def run(args: argparse.Namespace, out: TextIO | None = None) -> int:
    """Print the scores. Returns the exit status: 1 when a row was bad or a verifier failed. Raises: DataError, RewardError."""
    out = sys.stdout if out is None else out
    if reason := why_unreadable(args.input):
        raise DataError("cannot read the file", where=str(args.input), got=reason)
    with RewardPool(args.reward, args.timeout_s, args.num_workers) as pool:
        scored = score_lines(args.input, pool, args.prompt_end)
        try:
            return _write_json(scored, out) if args.json else _write_table(scored, out)
        except BrokenPipeError:  # `rpp score ... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # or the interpreter's last flush raises again
            return 1


def score_lines(path: Path, pool: RewardPool, prompt_end: str = "") -> Iterator[Scored]:
    """Every non-blank line of the file with its verdict, in order. Rows without a prompt_end get the one given here."""
    waiting: deque[tuple[int, Future[Verdict] | str]] = deque()
    for row in iter_jsonl(path):
        item = row.reason if isinstance(row, BadRow) else _item(row.fields, prompt_end)
        waiting.append((row.line, item if isinstance(item, str) else pool.submit(item)))
        if len(waiting) > _AHEAD:
            yield _finish(*waiting.popleft())
    while waiting:
        yield _finish(*waiting.popleft())


def _finish(line: int, outcome: Future[Verdict] | str) -> Scored:
    return Scored(line, None, outcome) if isinstance(outcome, str) else Scored(line, outcome.result())


def _item(row: Mapping[str, object], prompt_end: str) -> RewardInput | str:
    """What the reward is shown of a row, or why the row cannot be used."""
    fields = {"prompt": "", "prompt_end": prompt_end, **row}
    try:
        fields["answer"] = number_text(row.get("answer")) or row["answer"]
    except KeyError:
        return "field 'answer' is missing"
    except ValueError as error:
        return f"'answer' {error}"
    for name in _FIELDS:
        if name not in fields:
            return f"field {name!r} is missing"
        if not isinstance(fields[name], str):
            return f"{name!r} is of type {type(fields[name]).__name__}, expected text"
    return RewardInput(**{name: fields[name] for name in _FIELDS})


def _write_json(scored: Iterable[Scored], out: TextIO) -> int:
    status = 0
    for row in scored:
        out.write(row.as_json() + "\n")
        out.flush()
        status |= row.is_trouble
    return status


def _write_table(scored: Iterable[Scored], out: TextIO) -> int:
    total, count, troubles = 0.0, 0, []
    for row in scored:
        if row.verdict is not None:
            total, count = total + row.verdict.score, count + 1
        if row.is_trouble:
            troubles.append(row)
    lines = [printable(f"line {row.line:>6}  {row.trouble}") for row in troubles[:MAX_LISTED]]
    if len(troubles) > MAX_LISTED:
        lines.append(f"... and {len(troubles) - MAX_LISTED} more; --json lists all")
    lines += [
        f"rows scored  {count}",
        f"rows failed  {sum(row.verdict is not None for row in troubles)}",
        f"bad rows     {sum(row.verdict is None for row in troubles)}",
        f"mean score   {total / count:.4f}" if count else "mean score   none",
    ]
    out.write("\n".join(lines) + "\n")
    out.flush()
    return int(bool(troubles))
