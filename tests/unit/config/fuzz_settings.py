"""Mutated settings: bytes of run.yaml, values of single settings, and what follows the file on the command line.

By hand, 2,000 cases: python -m tests.unit.config.fuzz_settings
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import fields
from pathlib import Path

from megatron_rpp.config.load import dump, load
from megatron_rpp.config.load_decode import setting_names
from megatron_rpp.config.presets import PRESETS
from megatron_rpp.config.schema import Config
from tests.unit.fuzz import HOSTILE_TEXTS, RUN, any_value, main, mutate_bytes

_SETTINGS = tuple(setting_names())
_SECTIONS = tuple(spec.name for spec in fields(Config))
_TOKENS = (
    *(b"\x00", b"\x01", b"\x1b[2J", b"\x7f", b"\xc2\x9b", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\xe2\x80\xa8"),
    *(b"[" * 3000, b"{a: " * 2000, b"- " * 3000, b"? " * 300, b": ", b"\t", b"\n", b"\r", b"'", b'"', b"|\n", b">\n", b"#", b"%YAML 9.9\n"),
    *(b"!!bool maybe", b"!!int x", b"!!int ''", b"!!float ''", b"!!null x", b"!!timestamp 2024-99-99", b"!!binary '%'", b"!!set {a}"),
    *(
        b"!!python/object/apply:os.system [id]",
        b"!x y",
        b"!!map [a]",
        b"!!seq {a: 1}",
        b"!!str {",
        b"&a ",
        b"*a",
        b"<<: ",
        b"---\n",
        b"...",
    ),
    *(b"1" * 5000, b"1e999", b".nan", b"-.inf", b"0x" + b"f" * 400, b"extends: run.yaml\n", b'extends: "a\\0b"\n', b"extends: /dev/zero\n"),
    *(b"extends: pipe\n", b"extends: [" + b"run.yaml, " * 50 + b"]\n", b"preset: gspo\n", b'"\\ud800"', b'"\\0"', b"model: pipe\n"),
)


def mutate(chance: random.Random, folder: Path) -> list[str]:
    """Write run.yaml of one case; what follows `rpp check`."""
    path, kind = folder / "run.yaml", chance.randrange(5)
    path.unlink(missing_ok=True)
    if chance.random() < 0.02:
        path.symlink_to(chance.choice(("/dev/zero", "pipe", "run.yaml", "model", "nowhere")))
        return [str(path)]
    path.write_text(RUN)
    if kind == 0:
        path.write_bytes(mutate_bytes(chance, RUN.encode(), _TOKENS))
    elif kind == 1:
        path.write_bytes(mutate_bytes(chance, dump(load(path)).encode(), _TOKENS))
    elif kind == 2:
        path.write_text(RUN + "".join(f"{_line(chance)}\n" for _ in range(chance.choice((1, 1, 3)))), errors="surrogatepass")
    else:
        return [str(path), *(_override(chance) for _ in range(chance.choice((1, 1, 2, 5))))]
    return [str(path)]


def _line(chance: random.Random) -> str:
    """A whole section with a few settings, in JSON, which is YAML too; or one more file to read."""
    if chance.random() < 0.1:
        return f"extends: {json.dumps([chance.choice(HOSTILE_TEXTS) for _ in range(chance.choice((1, 1, 3)))])}"
    section = chance.choice([name for name in _SECTIONS if name not in ("model", "data", "run")])
    names = [name.partition(".")[2] for name in _SETTINGS if name.startswith(f"{section}.")] or ["x"]
    values = {chance.choice((*names, *names, chance.choice(HOSTILE_TEXTS))): any_value(chance) for _ in range(chance.choice((1, 2)))}
    return f"{section}: {json.dumps(values if chance.random() < 0.9 else any_value(chance), ensure_ascii=chance.random() < 0.5)}"


def _override(chance: random.Random) -> str:
    name = chance.choice(_SETTINGS)
    match chance.randrange(6):
        case 0:
            return f"{name}={chance.choice(_TOKENS).decode(errors='surrogateescape')}"
        case 1:
            return f"preset={chance.choice((*PRESETS, 'x'))}"
        case 2:
            return mutate_bytes(chance, f"{name}=1".encode(), _TOKENS).decode(errors="surrogateescape").lstrip("-") or "x"
        case _:
            return f"{name}={json.dumps(any_value(chance), ensure_ascii=chance.random() < 0.5)}"


if __name__ == "__main__":
    sys.exit(main(mutate, count=2000))
