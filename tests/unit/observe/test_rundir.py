"""The run directory: one run at a time, whole files, and what a rank prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.errors import RppError, StorageError
from megatron_rpp.observe.rundir import RunDir, versions
from megatron_rpp.version import __version__

HOLDER = """
import sys, time
from pathlib import Path
from megatron_rpp.observe.rundir import RunDir
with RunDir.open(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_cannot_share_a_directory_and_a_dead_one_does_not_hold_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RppError, match=f"another run is writing here\n  got: process {holder.pid} on "), RunDir.open(tmp_path / "run"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with RunDir.open(tmp_path / "run") as run:
        assert (run.path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_directory_can_be_used_again_by_the_same_process(tmp_path: Path) -> None:
    for _ in range(2):
        with RunDir.open(tmp_path) as run:
            assert run.checkpoints.is_dir()


def test_a_directory_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file is where a directory must be made"), RunDir.open(tmp_path / "file" / "run"):
        pass


def test_a_directory_that_was_removed_or_replaced_is_noticed(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run") as run:
        run.check_held()
        shutil.rmtree(run.path)
        with pytest.raises(StorageError, match=r"was removed or replaced(.|\n)*no run.lock there"):
            run.check_held()
        with RunDir.open(tmp_path / "run") as other:
            other.check_held()
            with pytest.raises(StorageError, match=r"the run\.lock of another run"):
                run.check_held()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with RunDir.open(tmp_path) as run:
        run.write_json("patches.json", {"b": 1, "a": [2]})
        with pytest.raises(TypeError):
            run.write_json("patches.json", {"a": object()})
        assert (tmp_path / "patches.json").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "logs", "patches.json", "run.lock"]


def test_versions_name_what_runs_and_nothing_private() -> None:
    found = versions()
    assert found["megatron_rpp"] == __version__
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["torch"].startswith("2.13")
    assert found["commit"] is None or len(found["commit"].removesuffix("+changed")) == 40
    json.dumps(found)


PRINTER = """
import os, sys
from pathlib import Path
from megatron_rpp.observe.rundir import RunDir, output_to
for _ in range(2):
    with output_to(RunDir(Path(sys.argv[1])).rank_log(3)):
        print("from python")
        os.system("echo from a child; echo its error >&2")
print("on the terminal again")
"""


def test_all_output_of_a_rank_goes_to_its_log_native_code_included(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", PRINTER, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "on the terminal again\n", "")
    log = tmp_path / "logs" / "rank-3.log"
    assert sorted(log.read_text().splitlines()) == sorted(["from python", "from a child", "its error"] * 2)
