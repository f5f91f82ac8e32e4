"""What dead runs leave: it is found and removed, and nothing else is."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rpp import __main__ as command_line
from megatron_rpp import doctor, leftovers
from megatron_rpp.leftovers import PrivateFolder, find_leftovers, list_shared, remove_if_abandoned

OWNER = """
import sys, time
from megatron_rpp.leftovers import PrivateFolder, list_shared
folder = PrivateFolder()
for name in sys.argv[1:]:
    list_shared(folder.path, name)
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR of this test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def shared() -> Iterator[Callable[[str], Path]]:
    """Makes files in /dev/shm."""
    made: list[Path] = []

    def make(prefix: str) -> Path:
        path = leftovers.SHARED_MEMORY / f"{prefix}{uuid.uuid4().hex}"
        path.write_bytes(bytes(4096))
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def start_owner() -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Starts processes that own a private folder."""
    started: list[subprocess.Popen[str]] = []

    def start(*listed: str) -> tuple[subprocess.Popen[str], Path]:
        owner = subprocess.Popen([sys.executable, "-c", OWNER, *listed], stdout=subprocess.PIPE, text=True)
        started.append(owner)
        return owner, Path(owner.stdout.readline().strip())

    yield start
    for owner in started:
        owner.kill()
        owner.wait()


def kill(owner: subprocess.Popen[str]) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait(20)


def test_a_private_folder_goes_with_its_block_and_with_what_it_lists(temporary: Path, shared: Callable[[str], Path]) -> None:
    segment = shared("psm_")
    with PrivateFolder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        list_shared(folder, f"/{segment.name}")
        assert find_leftovers() == []
        assert not remove_if_abandoned(folder)
        assert segment.exists()
    assert list(temporary.iterdir()) == []
    assert not segment.exists()


def test_doctor_lists_and_removes_what_a_killed_process_left(
    shared: Callable[[str], Path], start_owner: Callable[..., tuple[subprocess.Popen[str], Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    semaphore, segment, unrelated = shared("sem.mp-"), shared("sgl_shm_mq_1_"), shared("sem.mp-")
    dead, folder = start_owner(semaphore.name, segment.name)
    _, living = start_owner()
    assert find_leftovers() == []
    kill(dead)
    assert [(each.folder, set(each.shared), each.num_bytes) for each in find_leftovers()] == [(folder, {semaphore, segment}, 8192)]
    finding = doctor.check_leftovers(find_leftovers())
    assert (finding.status, finding.remedy) == ("warn", "rpp doctor --clean")
    assert finding.text.startswith("by dead runs: 1 folders, 2 entries of 0.0 MiB in /dev/shm\n")
    assert all(str(path) in finding.text for path in (folder, semaphore, segment))
    doctor._remove_leftovers(quiet=False)
    assert set(capsys.readouterr().out.splitlines()) == {f"removed {path}" for path in (folder, semaphore, segment)}
    assert [path.exists() for path in (folder, semaphore, segment, living, unrelated)] == [False, False, False, True, True]
    assert doctor.check_leftovers(find_leftovers()).status == "ok"


def test_only_clean_removes(start_owner: Callable[..., tuple[subprocess.Popen[str], Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that take seconds are left out."""
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.check_leftovers(find_leftovers())]))
    dead, folder = start_owner()
    kill(dead)
    assert command_line.main(["doctor"]) == 0
    assert folder.exists()
    assert command_line.main(["doctor", "--clean", "--json"]) == 0
    assert not folder.exists()


def test_a_segment_that_a_living_process_uses_stays(
    shared: Callable[[str], Path], start_owner: Callable[..., tuple[subprocess.Popen[str], Path]]
) -> None:
    segment = shared("psm_")
    dead, folder = start_owner(segment.name)
    kill(dead)
    with open(segment, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    assert [each.shared for each in find_leftovers()] == [()]
    assert remove_if_abandoned(folder)
    assert segment.exists()
    memory.close()


@pytest.mark.parametrize("name", ["OUTSIDE", "psm_/../OUTSIDE", "another-program", "", "psm_a/b"])
def test_a_list_that_names_something_else_is_not_believed(
    name: str, temporary: Path, shared: Callable[[str], Path], start_owner: Callable[..., tuple[subprocess.Popen[str], Path]]
) -> None:
    other, outside = shared("another-program"), temporary / "precious"
    outside.touch()
    name = name.replace("OUTSIDE", os.path.relpath(outside, leftovers.SHARED_MEMORY))
    dead, folder = start_owner(name.replace("another-program", other.name))
    kill(dead)
    assert [each.shared for each in find_leftovers()] == [()]
    assert remove_if_abandoned(folder)
    assert other.exists()
    assert outside.exists()


def test_folders_of_other_programs_stay(temporary: Path) -> None:
    """Some begin as ours do, but have no lock in them."""
    for name in ("rpp-notes", ".rpp-new-1", "rpp-link", "other"):
        (temporary / name).mkdir()
    (temporary / "rpp-link").rmdir()
    (temporary / "rpp-link").symlink_to(temporary / "other")
    assert find_leftovers() == []
    assert not any(remove_if_abandoned(temporary / name) for name in ("rpp-notes", ".rpp-new-1", "other"))


def test_a_folder_whose_owner_died_while_it_made_it_goes_after_an_hour(temporary: Path) -> None:
    draft = temporary / ".rpp-new-1"
    draft.mkdir()
    assert find_leftovers() == []
    os.utime(draft, (0, 0))
    assert [each.folder for each in find_leftovers()] == [draft]
    assert remove_if_abandoned(draft)
    assert not draft.exists()
