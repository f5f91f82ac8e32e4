"""The roll-out ledger: what is on disk after a crash, and what is made of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpp.errors import CheckpointError
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.types import Response

NAME = "step-000003"
VOCAB = 300


def _response(uid: str, sample: int, version: int = 3) -> Response:
    return Response(uid, sample, (5, 6, 1), (-0.1, -1.2345678901234567, -3.0e-7), "a \n b \u2028", "stop", version, None, None)


def test_responses_come_back_exactly(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, vocab_size=VOCAB)
    responses = [_response("a", 0), _response("a", 1), _response("b", 0)]
    ledger.append(NAME, responses[:2])
    ledger.append(NAME, responses[2:])
    assert Ledger(tmp_path, vocab_size=VOCAB).load(NAME) == {(each.prompt_uid, each.sample, 3): each for each in responses}


def test_each_leader_writes_its_own_file_and_reads_all(tmp_path: Path) -> None:
    Ledger(tmp_path, 0, vocab_size=VOCAB).append(NAME, [_response("a", 0)])
    Ledger(tmp_path, 1, vocab_size=VOCAB).append(NAME, [_response("b", 0)])
    Ledger(tmp_path, 1, vocab_size=VOCAB).append("step-000004", [_response("c", 0)])
    assert set(Ledger(tmp_path, 1, vocab_size=VOCAB).load(NAME)) == {("a", 0, 3), ("b", 0, 3)}


def test_a_response_of_another_version_is_another_entry(tmp_path: Path) -> None:
    Ledger(tmp_path, vocab_size=VOCAB).append(NAME, [_response("a", 0, 3), _response("a", 0, 4)])
    assert set(Ledger(tmp_path, vocab_size=VOCAB).load(NAME)) == {("a", 0, 3), ("a", 0, 4)}


@pytest.mark.parametrize("torn_bytes", [1, 10, 60])
def test_a_torn_last_line_is_not_read_and_the_next_response_is_not_glued_to_it(tmp_path: Path, torn_bytes: int) -> None:
    Ledger(tmp_path, vocab_size=VOCAB).append(NAME, [_response("a", 0), _response("b", 0)])
    path = next(tmp_path.glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-torn_bytes])
    assert set(Ledger(tmp_path, vocab_size=VOCAB).load(NAME)) == {("a", 0, 3)}
    Ledger(tmp_path, vocab_size=VOCAB).append(NAME, [_response("c", 0)])
    assert set(Ledger(tmp_path, vocab_size=VOCAB).load(NAME)) == {("a", 0, 3), ("c", 0, 3)}


def test_a_whole_line_that_is_no_response_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.leader-0.jsonl"
    path.write_text(json.dumps({"prompt_uid": "a"}) + "\n")
    with pytest.raises(CheckpointError, match=rf"{path.name}:1: a line of the ledger is not a response"):
        Ledger(tmp_path, vocab_size=VOCAB).load(NAME)


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "a token beyond the vocabulary": ({"tokens": [5, VOCAB, 1]}, f"tokens[1] is {VOCAB}, not a token of the model, which has {VOCAB}"),
    "a huge token": ({"tokens": [10**9, 6, 1]}, "tokens[0] is 1000000000, not a token"),
    "a negative token": ({"tokens": [5, 6, -1]}, "tokens[2] is -1, not a token"),
    "a token that is a float": ({"tokens": [5, 6.0, 1]}, "tokens[1] is 6.0, not a token"),
    "a token that is a flag": ({"tokens": [5, True, 1]}, "tokens[1] is True, not a token"),
    "tokens that are text": ({"tokens": "abc"}, "tokens and logp_rollout are not two lists of one length"),
    "fewer log-probabilities": ({"logp_rollout": [-1.0, -1.0]}, "tokens and logp_rollout are not two lists of one length"),
    "NaN": ({"logp_rollout": [-1.0, float("nan"), -1.0]}, "NaN is not a JSON number"),
    "infinity": ({"logp_rollout": [-1.0, float("-inf"), -1.0]}, "-Infinity is not a JSON number"),
    "a log-probability that is text": ({"logp_rollout": [-1.0, "x", -1.0]}, "logp_rollout[1] is 'x', not a finite number"),
    "a log-probability that is null": ({"logp_rollout": [-1.0, None, -1.0]}, "logp_rollout[1] is None, not a finite number"),
    "a score that is text": ({"score": "1"}, "score is '1', not a finite number or null"),
    "a score that is a flag": ({"score": True}, "score is True, not a finite number or null"),
    "a score that is NaN": ({"score": float("nan")}, "NaN is not a JSON number"),
    "a reason that is a number": ({"reward_failed": 3}, "reward_failed is 3, not text or null"),
    "a uid that is a list": ({"prompt_uid": ["a"]}, "prompt_uid is ['a'], not text"),
    "text that is null": ({"text": None}, "text is None, not text"),
    "a sample that is text": ({"sample": "0"}, "sample is '0', not a whole number"),
    "a version below 0": ({"version": -1}, "version is -1, not a whole number"),
    "a version that is a list": ({"version": []}, "version is [], not a whole number"),
    "another end": ({"finish_reason": "\x1b[31m"}, "finish_reason is '\\x1b[31m', not one of stop, length, abort"),
    "one more field": ({"more": 1}, "the fields more are missing or unknown"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
def test_a_response_that_no_engine_of_this_model_made_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    ledger = Ledger(tmp_path, vocab_size=VOCAB)
    ledger.append(NAME, [_response("a", 0)])
    path = tmp_path / f"{NAME}.leader-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(json.loads(whole) | change).encode() + b"\n")
    with pytest.raises(CheckpointError) as caught:
        Ledger(tmp_path, vocab_size=VOCAB).load(NAME)
    message = f"{path}:2: a line of the ledger is not a response\n  got: {reason}"
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("fix: delete the file; its responses will be sampled again")
    path.write_bytes(whole)
    assert set(Ledger(tmp_path, vocab_size=VOCAB).load(NAME)) == {("a", 0, 3)}


@pytest.mark.parametrize("line", [b"[1]", b"null", b"[" * 100_000, b"\xff", b'{"tokens": [1], "tokens": [2]}', b"\0\0"])
def test_a_line_that_is_no_json_object_is_refused_with_its_place(tmp_path: Path, line: bytes) -> None:
    (tmp_path / f"{NAME}.leader-0.jsonl").write_bytes(line + b"\n")
    with pytest.raises(CheckpointError, match=r"leader-0\.jsonl:1: a line of the ledger is not a response"):
        Ledger(tmp_path, vocab_size=VOCAB).load(NAME)


def test_the_last_token_of_the_vocabulary_and_no_token_at_all_are_read(tmp_path: Path) -> None:
    responses = [replace(_response("a", 0), tokens=(0, VOCAB - 1, 1)), replace(_response("b", 0), tokens=(), logp_rollout=())]
    Ledger(tmp_path, vocab_size=VOCAB).append(NAME, responses)
    assert [*Ledger(tmp_path, vocab_size=VOCAB).load(NAME).values()] == responses


def test_a_pipe_in_place_of_a_file_does_not_block_a_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{NAME}.leader-0.jsonl")
    with pytest.raises(CheckpointError, match="cannot read the ledger\n  got: a named pipe"):
        Ledger(tmp_path, vocab_size=VOCAB).load(NAME)


def test_what_was_appended_is_there_after_kill_9(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.types import Response
ledger = Ledger(Path({str(tmp_path)!r}), vocab_size={VOCAB})
ledger.append({NAME!r}, [Response("a", 0, (1,), (-1.0,), "x", "stop", 3)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False, timeout=60).returncode == -signal.SIGKILL
    assert set(Ledger(tmp_path, vocab_size=VOCAB).load(NAME)) == {("a", 0, 3)}
