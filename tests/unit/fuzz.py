"""Many mutated inputs through `rpp check` in one process, and what became of each.

A case is accepted, or refused with one message that can be printed as it is. Anything else is a fault: an exception (a traceback to a
user), a case that takes LIMIT_S (a hang), or a message with control characters or without its prefix.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_rpp.__main__ import main as rpp

LIMIT_S = 20.0
_MEMORY = 6 * 2**30  # of address space: an input that takes all memory fails instead of taking the host with it

Mutate = Callable[[random.Random, Path], list[str]]  # (source of chance, folder of the project) -> what follows `rpp check`

HOSTILE_TEXTS = (
    *("", " ", "\x00", "\x1b[31mred\x1b[0m", "\x07\r\x08", "\u202eright\u2066", "\x9b2J", "\ud800", "\u2028", "a\nb", "\U0001f600"),
    *("/dev/zero", "/", ".", "..", "~", "~nobody/x", "pipe", "nowhere", "a" * 5000, "../" * 900, "{}", "[link=x]y[/link]", "%s%n", "nan"),
)
HOSTILE_NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
)


class Hang(BaseException):
    """A case that took too long."""


@dataclass(slots=True)
class Summary:
    """What became of the cases. faults: number of the case and what happened."""

    count: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    unclean: int = 0
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, case: int, seconds: float, detail: str) -> None:
        self.count += 1
        self.slowest_s = max(self.slowest_s, round(seconds, 2))
        setattr(self, kind, getattr(self, kind) + 1)
        if kind not in ("accepted", "refused"):
            self.faults.append(f"case {case}: {kind}: {detail}")


def any_value(chance: random.Random, depth: int = 0) -> object:
    """A value that a setting or an entry hardly ever has."""
    kind = chance.randrange(8)
    if kind < 3:
        return chance.choice(HOSTILE_NUMBERS)
    if kind < 5:
        return chance.choice(HOSTILE_TEXTS)
    if kind == 5 or depth > 3:
        return chance.choice((None, True, False))
    inner = [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return inner if kind == 6 else {str(chance.choice(HOSTILE_TEXTS)): value for value in inner}


def mutate_bytes(chance: random.Random, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    """`data` with one to six changes: bits flipped, parts removed, doubled or moved, and hostile tokens put in."""
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        place, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        end = min(end, place + chance.choice((1, 4, 40, 400)))
        match chance.randrange(6):
            case 0 if place < len(data):
                data = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
            case 1:
                data = data[:place] + data[end:]
            case 2:
                data = data[:end] + data[place:end] * chance.choice((1, 2, 50)) + data[end:]
            case 3:
                data = data[:place] + chance.randbytes(chance.choice((1, 3))) + data[place:]
            case 4:
                data = data[:place]
            case _:
                data = data[:place] + chance.choice(tokens) + data[end:]
    return data


def run_cases(mutate: Mutate, *, count: int, seed: int, folder: Path) -> Summary:
    """Case n depends on `seed` and n alone, so that one that fails can be run by itself."""
    summary = Summary()
    signal.signal(signal.SIGALRM, _raise_hang)
    for case in range(count):
        arguments = mutate(random.Random(f"{seed}/{case}"), folder)
        start = time.monotonic()
        kind, detail = _outcome(arguments)
        summary.add(kind, case, time.monotonic() - start, detail)
    return summary


def _outcome(arguments: list[str]) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = rpp(["check", *arguments])
    except Hang:
        return "hangs", f"more than {LIMIT_S:g} s"
    except BaseException as error:  # noqa: BLE001 -- a user would see a traceback
        return "tracebacks", f"{type(error).__name__}: {str(error)[:100]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    said, complaint = out.getvalue(), err.getvalue()
    text = (said + complaint).replace("\n", "")
    if not text.isprintable() and any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u202e\u2066\ud800\u2028" for char in text):
        return "unclean", ascii(text)[:200]
    if code == 0:
        return "accepted", ""
    lines = complaint.splitlines()
    is_one_message = lines and lines[0].startswith("rpp check: ") and all(line.startswith("  ") for line in lines[1:])
    return ("refused", "") if is_one_message else ("unclean", f"exit {code}: {ascii(complaint)[:200]}")


def _raise_hang(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def project() -> Iterator[Path]:
    """A folder in which `rpp check run.yaml` holds: run.yaml, model/, train.jsonl, and a pipe that nobody writes to."""
    with tempfile.TemporaryDirectory(prefix="rpp-fuzz-") as name, contextlib.chdir(name):
        folder = Path(name)
        (folder / "model").mkdir()
        alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        Tokenizer(models.BPE(vocab=alphabet, merges=[])).save(str(folder / "model" / "tokenizer.json"))
        (folder / "model" / "config.json").write_text(json.dumps(QWEN))
        (folder / "train.jsonl").write_text("")
        (folder / "run.yaml").write_text(RUN)
        os.mkfifo(folder / "pipe")
        yield folder


RUN = "model: {hf: model, dtype: float32}\ndata: {train: train.jsonl}\nrun: {device: cpu}\n"
QWEN = {
    "model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": 0,
}  # fmt: skip


def main(mutate: Mutate, *, count: int) -> int:
    """Run `count` cases, or as many as the command line says, and print the summary. The exit status is 1 if there is a fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with project() as folder:
        summary = run_cases(mutate, count=options.count, seed=options.seed, folder=folder)
    values = {name: getattr(summary, name) for name in Summary.__slots__}
    if options.json:
        print(json.dumps(values))
    else:
        faults = values.pop("faults")
        print(", ".join(f"{name} {value}" for name, value in values.items()), *faults[:40], sep="\n")
    sys.stdout.flush()
    return int(bool(summary.faults))


def run_module(module: str, *, count: int, seed: int) -> dict[str, Any]:
    """The summary of a generator's `main` in a process of its own, whose memory is limited."""
    command = [sys.executable, "-m", module, "--json", "--count", str(count), "--seed", str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S * 15, cwd=Path(__file__).parents[2])
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout)
