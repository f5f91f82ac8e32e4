"""Rows that try to break a reward or `rpp score`: `python -m tests.unit.reward.hostile_rows` runs 2,000 through each reward.

Every line that goes in must come out, in order and in time, without a traceback. What the scores are is not judged here.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

REWARDS = ("exact", "arithmetic", "math", "tests.unit.reward.hostile_rows:naive")
SEED = 11
TIMEOUT_S = 2.0  # of one verifier call


def naive(item: object) -> float:
    """A reward as users write them: it trusts what a model wrote."""
    import re

    number = re.findall(r"-?\d+(?:\.\d+)?", item.response)[-1]  # no number: an IndexError
    value = eval(number, {"__builtins__": {}})  # noqa: S307  nothing but digits, a sign and a point; 007 is a SyntaxError
    return 1.0 / abs(float(item.answer) - value) if float(item.answer) != value else 1.0


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=rng.choice([1, 3, 30, 400, 5000])))


def _number(rng: random.Random) -> str:
    shapes = ("{0}", "-{0}", "{0}.{1}", "{0}e{1}", "1e{0}", "-1E-{0}", "0x{0}", "{0}/{1}", "{0}^{1}", "{0}**{1}", "{0}!", "{0},{1}", "{0}%")
    return rng.choice(shapes).format(_digits(rng), _digits(rng))


def _unicode(rng: random.Random) -> str:
    blocks = (
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x660, 0x669),
        (0x200B, 0x206F),
        (0x2150, 0x22FF),
        (0xFF10, 0xFF5E),
        (0x1D7CE, 0x1D7FF),
    )
    return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 200)))


def _controls(rng: random.Random) -> str:
    return "".join(rng.choice(["\0", "\x1b[2J", "\x1b]0;x\a", "\r", "\b", "\x7f", "\x85", "\u2028", "\ufeff", "7"]) for _ in range(40))


def _surrogates(rng: random.Random) -> str:
    return "".join(chr(rng.randint(0xD800, 0xDFFF)) if rng.random() < 0.5 else "4" for _ in range(20))


def _latex(rng: random.Random, depth: int = 0) -> str:
    if depth > 8 or rng.random() < 0.25:
        return rng.choice(["x", "7", "\\pi", "\\infty", "", "10^{10}", "-1", "\\text{ or }", "i", "e", "0"])
    a, b = _latex(rng, depth + 1), _latex(rng, depth + 1)
    shapes = (
        "\\frac{%s}{%s}",
        "%s^{%s}",
        "\\sqrt[%s]{%s}",
        "\\left(%s, %s\\right)",
        "%s = %s",
        "\\binom{%s}{%s}",
        "\\log_{%s} %s",
        "%s \\cdot %s",
    )
    more = (
        "\\int_{%s}^{%s} x dx",
        "\\sum_{n=%s}^{%s} n",
        "\\lim_{x \\to %s} %s",
        "\\{%s, %s\\}",
        "\\boxed{%s}%s",
        "%s \\mod %s",
        "%s<x<%s",
        "\\frac{%s{%s",
    )
    return rng.choice(shapes + more) % (a, b)


def _nested(rng: random.Random) -> str:
    depth = rng.choice([10, 19, 20, 21, 100, 3000])
    opening, closing = rng.choice(
        [("{", "}"), ("(", ")"), ("\\sqrt{", "}"), ("\\left[", "\\right]"), ("\\boxed{", "}"), ("<think>", "</think>")]
    )
    return opening * depth + "7" + closing * rng.choice([depth, depth - 1, 0])


def _long(rng: random.Random) -> str:
    part = rng.choice(
        ["a", "9", "{", "\\frac", " ", "\n", "$", "\\boxed{7}", "1,", "=4", "-", "####", "the answer is ", "\U0001f600", "\\("]
    )
    return (part * 100_000)[:100_000]


def _expensive(rng: random.Random) -> str:
    texts = (
        "\\binom{2000000000}{1000000000}",
        "9^{9^{9^{9}}}",
        "10000000!",
        "2^{10^{9}}",
        "\\int_0^1 x^{x^{x}} dx",
        "\\sum_{n=1}^{10^{12}} \\frac{1}{n}",
    )
    return rng.choice(texts)


_TEXTS: tuple[Callable[[random.Random], str], ...] = (_number, _unicode, _controls, _surrogates, _latex, _latex, _nested)
_WORDINGS = (
    "{}",
    "\\boxed{{{}}}",
    "The answer is ${}$.",
    "<think>{}</think>{}",
    "#### {}",
    "**{}**",
    "\\boxed{{{}",
    "Answer: {} or {}",
    "",
)
_WRONG = (None, True, 7, -0.0, 1e308, 10**4000, [], [1], {}, {"text": "4"}, "")


def _text(rng: random.Random) -> str:
    kinds = (*_TEXTS, _long) if rng.random() < 0.1 else _TEXTS
    kinds = (_expensive,) if rng.random() < 0.01 else kinds
    return rng.choice(_WORDINGS).format(rng.choice(kinds)(rng), rng.choice(_TEXTS)(rng))


def _row(rng: random.Random) -> bytes:
    row: dict[str, object] = {
        "prompt": _text(rng),
        "response": _text(rng),
        "answer": _text(rng),
        "prompt_end": rng.choice(["", "<think>\n"]),
    }
    if rng.random() < 0.5:
        row["answer"] = _number(rng) if rng.random() < 0.5 else str(rng.randint(-99, 99))
    if rng.random() < 0.2:
        row["response"] = row["answer"]
    if rng.random() < 0.15:
        row[rng.choice([*row])] = rng.choice(_WRONG)
    if rng.random() < 0.05:
        row.pop(rng.choice([*row]))
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    if rng.random() < 0.05:
        place = rng.randrange(len(line))
        line = line[:place] + rng.choice([b"", b"\xff", b"\0", b"NaN", b"}", b"[" * 100_000]) + line[place + rng.randint(0, 5) :]
    return line.replace(b"\n", b" ") or b"{}"


def make_rows(count: int, seed: int = SEED) -> list[bytes]:
    """Lines of a JSONL file. None is blank."""
    rng = random.Random(seed)
    return [_row(rng) for _ in range(count)]


def run_through(reward: str, lines: list[bytes], limit_s: float, *, as_json: bool = True) -> Counter[str]:
    """Score the lines with `rpp score`, and count what became of them. Raises: AssertionError, subprocess.TimeoutExpired."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(b"\n".join(lines))
        file.flush()
        command = [sys.executable, "-m", "megatron_rpp", "score", "--reward", reward, "--input", file.name]
        command += ["--timeout-s", str(TIMEOUT_S), *["--json"] * as_json]
        done = subprocess.run(command, capture_output=True, timeout=limit_s)
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr[-2000:]
    assert done.returncode in (0, 1), (done.returncode, done.stderr[-2000:])
    if not as_json:
        return Counter()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(lines) + 1))
    return Counter("bad row" if "bad_row" in row else row.get("reward_failed", "scored") for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    lines = make_rows(options.rows, options.seed)
    for reward in REWARDS:
        begin = time.monotonic()
        counts = run_through(reward, lines, limit_s=len(lines) * TIMEOUT_S)
        print(
            f"{reward}: {len(lines)} rows, {len(lines)} verdicts, 0 tracebacks, {time.monotonic() - begin:.0f} s; {dict(counts)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
