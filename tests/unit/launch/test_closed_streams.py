"""A command whose caller has closed the standard streams, as `2>&-` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# `print_errors` is what a rank without a launcher calls first.
PROGRAM = """
import os, pathlib, sys
from megatron_rpp.__main__ import main
main(["check", "missing.yaml"])
from megatron_rpp.dist import leaving
leaving.print_errors(0, "train")
print("into nowhere", file=sys.stderr)
found = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
pathlib.Path("found").write_text(" ".join(found))
"""


def test_closed_streams_lead_to_dev_null(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    line = f"exec {sys.executable} program.py <&- >&- 2>&-"
    done = subprocess.run(line, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "found").read_text() == "/dev/null /dev/null /dev/null"
