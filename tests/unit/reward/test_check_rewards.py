"""Reference answers score against themselves and wrong ones do not: tools/check_rewards.py on a few rows of our own.

The same tool run over the whole of GSM8K, MATH, AIME 24 and AMC 23 is how reward `math` was judged.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REFERENCES = Path(__file__).parent / "references"
TOOL = Path(__file__).parents[3] / "tools" / "check_rewards.py"


def run_tool(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), str(directory), "--num-workers", "1"], capture_output=True, text=True, timeout=120)


def test_every_reference_scores_in_every_wording_and_no_wrong_answer_does() -> None:
    done = run_tool(REFERENCES)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    counts = {(row[0], " ".join(row[1:-4])): (int(row[-4]), int(row[-3])) for row in rows[1:]}
    assert counts["gsm8k", "as written"] == counts["gsm8k", "boxed"] == counts["gsm8k", "in a sentence"] == (8, 8)
    assert counts["math", "as written"] == counts["math", "boxed"] == counts["math", "in a sentence"] == (10, 10)
    assert counts["math", "restyled"] == (4, 4)
    assert counts["amc", "as written"] == (2, 2)
    for data_set, size in (("gsm8k", 8), ("math", 10), ("amc", 2)):
        assert counts[data_set, "another answer"] == counts[data_set, "another, in a sentence"] == (size, 0)
    assert counts["gsm8k", "next integer"] == (7, 0)
    assert not any("failed" in line or "ACCEPTED" in line or "refused" in line for line in done.stdout.splitlines()[1:])


def test_a_reference_that_no_verifier_accepts_is_printed_and_fails_the_tool(tmp_path: Path) -> None:
    """A cut-off box is no answer, so the row cannot score against itself."""
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "test.jsonl").write_text('{"problem": "q", "answer": "<think> 7"}\n')
    done = run_tool(tmp_path)
    assert done.returncode == 1
    assert "math:1 as written, refused" in done.stdout


def test_a_directory_without_references_is_not_a_pass(tmp_path: Path) -> None:
    assert run_tool(tmp_path).returncode == 2
