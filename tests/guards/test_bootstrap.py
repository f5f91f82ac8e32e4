"""tools/bootstrap.sh on made-up hosts: which Python it takes, what it says, what it keeps. Nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_rpp import doctor
from tests.guards.source import ROOT

COREUTILS = ("cat", "chmod", "cp", "dirname", "head", "ls", "mkdir", "readlink", "rm", "sha256sum", "tail", "touch", "tr")
TOOLS = (*COREUTILS, "bash", "flock", "grep", "sed")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED = "[bootstrap] Python 3.11, 3.12 or 3.13 is needed"

# `-c` runs the code in this Python under another version. `-m venv` makes a folder, `-m pip install` only notes its
# arguments, and `-m pip index` is the real one.
FAKE_PYTHON = """#!{bash}
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; echo "{version}" >"$3/pyvenv.cfg"; cp "$0" "$3/bin/python"; echo "$0" >"$3/made-from" ;;
    "-m pip")
        case "$*" in
            *" index "*) exec {real} "$@" ;;
            *" cache dir") echo "${{FAKE_CACHE:?}}" ;;
            *" install "*)
                folder=$(cd "$(dirname "$0")/.." && pwd)
                echo "$*" >>"$folder/installs"
                mkdir -p "$folder/lib/python{version}/site-packages/torch-2.13.0.dist-info" ;;
        esac ;;
    *)
        flags=()
        while [[ $1 != -c ]]; do flags+=("$1"); shift; done
        exec {real} "${{flags[@]}}" -c "import sys; sys.version_info = ({version_tuple}, 2, 'final', 0)
sys._base_executable = '$(cat "$(dirname "$0")/../made-from" 2>/dev/null || echo "$0")'
for name in {missing}: sys.modules[name] = None
$2" ;;
esac
"""
FAKE_DF = """#!{bash}
for path; do :; done
echo "     Avail Mounted on"
case $path in
    {cases}
esac
"""


class Host:
    """A project with the script, a PATH of our own, and a package index that has torch for CUDA, and for the CPU elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.project, self.bin, self.home = folder / "our project", folder / "bin", folder / "home"
        self.venv = self.project / ".venv"
        for name in ("tools/bootstrap.sh", "requirements/cpu.txt", "requirements/dev.txt", "setup.py"):
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.project / name)
        self.bin.mkdir()
        self.home.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        self.add_index("pypi", "2.12.1", "2.13.0", "2.14.0")
        self.add_index("cpu", "2.13.0+cpu", "2.14.0+cpu")
        self.add_disks({"*": (100_000, "/")})

    def add_python(self, name: str, version: str, missing: str = "[]", folder: Path | None = None) -> Path:
        text = FAKE_PYTHON.format(
            bash=shutil.which("bash"), real=sys.executable, version=version, version_tuple=version.replace(".", ", "), missing=missing
        )
        return self.add_program(name, text, folder)

    def add_program(self, name: str, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def add_index(self, name: str, *versions: str) -> str:
        page = self.home / name / "torch" / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        files = [f"torch-{version}-py3-none-any.whl" for version in versions]
        page.write_text("<!DOCTYPE html><html><body>" + "".join(f'<a href="{file}">{file}</a>' for file in files) + "</body></html>")
        return (self.home / name).as_uri()

    def add_disks(self, disks: dict[str, tuple[int, str]]) -> None:
        """disks: pattern of a path -> free MB and the mount point."""
        cases = "\n    ".join(f'{pattern}) echo "{mb * 1_000_000 // 1024 + 1} {mount}" ;;' for pattern, (mb, mount) in disks.items())
        self.add_program("df", FAKE_DF.format(bash=shutil.which("bash"), cases=cases))

    def run(self, **settings: object) -> tuple[int, list[str]]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "RPP_", "PYTHON"))}
        env |= {"PATH": str(self.bin), "HOME": str(self.home), "TMPDIR": str(self.home / "tmp"), "FAKE_CACHE": str(self.home / "cache")}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (self.home / "pypi").as_uri(), "PIP_NO_CACHE_DIR": "1"}
        env |= {name: str(value) for name, value in settings.items()}
        command = [shutil.which("bash"), str(self.project / "tools" / "bootstrap.sh")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert result.stdout == ""
        return result.returncode, [re.sub(r"\b\d+ s$", "0 s", line) for line in result.stderr.splitlines()]

    def installs(self) -> list[str]:
        path = self.venv / "installs"
        return path.read_text().splitlines() if path.exists() else []

    def made_from(self) -> Path:
        return Path((self.venv / "made-from").read_text().strip())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_a_python_the_ways_to_get_one_are_named(host: Host) -> None:
    code, lines = host.run()
    assert (code, len(lines)) == (1, 5)
    assert lines[0] == f"{NEEDED}. Found on PATH: no Python."
    assert lines[1] == "[bootstrap] Get one in any of these ways, then run this command again:"
    assert [line.split()[1:4] for line in lines[2:]] == [["apt:", "sudo", "apt-get"], ["uv:", "uv", "venv"], ["conda:", "conda", "create"]]
    assert f"uv venv --seed --python 3.12 '{host.venv}'" in lines[3]
    assert not host.venv.exists()


def test_pythons_of_other_versions_are_listed_with_their_versions(host: Host) -> None:
    old, new = host.add_python("python3", "3.10"), host.add_python("python3.12", "3.14")
    shim = host.add_program("python3.13", "#!/bin/sh\necho 'python3.13: command not found' >&2\nexit 127\n")
    code, lines = host.run()
    assert code == 1
    found = f"{old} (Python 3.10.2), {new} (Python 3.14.2), {shim} (does not run, or is not a standard CPython)"
    assert lines[0] == f"{NEEDED}. Found on PATH: {found}."


def test_rpp_python_must_be_an_accepted_one_even_where_path_has_another(host: Host) -> None:
    host.add_python("python3", "3.12")
    old = host.add_python("old", "3.9")
    remedy = "[bootstrap] Set RPP_PYTHON to one of these versions, or unset it to search PATH."
    assert host.run(RPP_PYTHON=old) == (1, [f"{NEEDED}, but RPP_PYTHON is {old} (Python 3.9.2).", remedy])
    code, lines = host.run(RPP_PYTHON="/nowhere/python")
    assert (code, lines[0]) == (1, f"{NEEDED}, but RPP_PYTHON is /nowhere/python (does not run, or is not a standard CPython).")
    assert not host.venv.exists()


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": "3.13", "python3.11": "3.11"}, "python3"),
        ({"python3": "3.10", "python3.13": "3.13", "python3.12": "3.12"}, "python3.12"),
        ({"python3": "3.14", "python3.13": "3.13"}, "python3.13"),
        ({"python3.11": "3.11", "python3.13": "3.13"}, "python3.11"),
    ],
)
def test_python3_comes_first_then_the_others_by_name(host: Host, pythons: dict[str, str], taken: str) -> None:
    for name, version in pythons.items():
        host.add_python(name, version)
    code, lines = host.run()
    assert (code, lines[-1]) == (0, f"[bootstrap] ready: {host.venv}/bin/rpp")
    assert host.made_from() == host.bin / taken


def test_rpp_python_comes_before_path(host: Host) -> None:
    host.add_python("python3", "3.11")
    chosen = host.add_python("python", "3.13", folder=host.home / "elsewhere")
    assert host.run(RPP_PYTHON=chosen)[0] == 0
    assert host.made_from() == chosen


def test_a_shim_that_starts_nothing_does_not_hide_the_python_behind_it(host: Host) -> None:
    shims = host.home / "shims"
    host.add_program("python3", "#!/bin/sh\nexit 127\n", shims)
    host.add_python("python3", "3.12")
    assert host.run(PATH=f"{shims}:{host.bin}")[0] == 0
    assert host.made_from() == host.bin / "python3"


@pytest.mark.parametrize("missing", ["ensurepip", "venv"])
def test_a_python_without_venv_is_named_with_its_package(host: Host, missing: str) -> None:
    bare = host.add_python("python3", "3.12", missing=f"['{missing}']")
    assert host.run() == (
        1,
        [
            f"[bootstrap] {bare} (Python 3.12) cannot make virtual environments: its module venv or ensurepip is missing.",
            "[bootstrap] On Debian and Ubuntu, run 'sudo apt-get install python3.12-venv', then this command again.",
            "[bootstrap] Otherwise set RPP_PYTHON to another Python 3.11, 3.12 or 3.13.",
        ],
    )
    host.add_python("python3.13", "3.13")
    assert host.run()[0] == 0
    assert host.made_from() == host.bin / "python3.13"


def test_the_second_run_does_nothing(host: Host) -> None:
    host.add_python("python3", "3.13")
    assert host.run()[0] == 0
    before = host.installs()
    assert [re.search(r"(-r|torch==|--editable)", line)[1] for line in before] == ["-r", "torch==", "--editable"]
    assert host.run() == (0, [])
    assert host.installs() == before


def test_an_environment_of_another_accepted_version_stays(host: Host) -> None:
    first = host.add_python("python3", "3.13")
    assert host.run()[0] == 0
    host.add_python("python3", "3.11").rename(host.bin / "python3.new")
    first.unlink(missing_ok=True)
    (host.bin / "python3.new").rename(first)
    assert host.run() == (0, [])
    (host.project / "setup.py").write_text("# changed\n")
    code, lines = host.run()
    assert (code, len(host.installs())) == (0, 6)
    assert [line for line in lines if "download" in line or "virtual environment" in line] == []  # torch is there already
    assert (host.venv / "pyvenv.cfg").read_text() == "3.13\n"


def test_rpp_python_of_another_version_than_the_environment_is_refused(host: Host) -> None:
    host.add_python("python3", "3.11")
    assert host.run()[0] == 0
    other = host.add_python("other", "3.12")
    assert host.run(RPP_PYTHON=other) == (
        1,
        [
            f"[bootstrap] {host.venv} has Python 3.11, but RPP_PYTHON is Python 3.12.",
            "[bootstrap] Remove that folder, set RPP_VENV to another one, or unset RPP_PYTHON.",
        ],
    )
    assert host.run(RPP_PYTHON=host.bin / "python3") == (0, [])


def test_an_unfinished_environment_is_made_anew_from_the_same_python(host: Host) -> None:
    first = host.add_python("python3.13", "3.13")
    assert host.run()[0] == 0
    host.add_python("python3", "3.11")
    (host.venv / ".rpp-stamp").rename(host.venv / ".rpp-unfinished")
    code, lines = host.run()
    assert (code, lines[0]) == (0, f"[bootstrap] {host.venv} is unfinished or belongs to another folder, making it anew")
    assert (host.made_from(), len(host.installs())) == (first, 3)


def test_an_environment_of_another_version_is_made_anew_only_if_this_script_made_it(host: Host) -> None:
    host.add_python("python3", "3.12")
    assert host.run()[0] == 0
    host.add_python("python", "3.14", missing="['pip', 'megatron_rpp']", folder=host.venv / "bin")  # the system's Python was upgraded
    code, lines = host.run()
    assert (code, lines[0]) == (0, f"[bootstrap] {host.venv} has no working Python 3.11, 3.12 or 3.13 with pip, making it anew")
    for python, missing in (("3.10", "[]"), ("3.12", "['pip']")):
        foreign = host.home / f"my-{python}"
        (foreign / "bin").mkdir(parents=True)
        (foreign / "pyvenv.cfg").touch()
        host.add_python("python", python, missing=missing, folder=foreign / "bin")
        code, lines = host.run(RPP_VENV=foreign)
        text = f"[bootstrap] {foreign} has no working Python 3.11, 3.12 or 3.13 with pip, and this script did not make it."
        assert (code, lines[0]) == (1, text)
        assert sorted(path.name for path in foreign.iterdir()) == ["bin", "pyvenv.cfg"]


def test_an_environment_made_by_other_means_is_filled(host: Host) -> None:
    """As `uv venv --seed` makes it, on a host whose own Python does not fit."""
    host.add_python("python3", "3.10")
    (host.venv / "bin").mkdir(parents=True)
    (host.venv / "pyvenv.cfg").touch()
    host.add_python("python", "3.12", folder=host.venv / "bin")
    code, lines = host.run()
    assert (code, lines[-1], len(host.installs())) == (0, f"[bootstrap] ready: {host.venv}/bin/rpp", 3)
    assert not any("virtual environment" in line for line in lines)


def test_a_folder_that_is_no_environment_is_left_alone(host: Host) -> None:
    host.add_python("python3", "3.12")
    host.venv.mkdir()
    (host.venv / "thesis.tex").touch()
    text = "holds something that is not a virtual environment; set RPP_VENV to another place"
    assert host.run() == (1, [f"[bootstrap] {host.venv} {text}"])
    assert [path.name for path in host.venv.iterdir()] == ["thesis.tex"]


def says_gpu(host: Host, has_gpu: bool) -> None:
    listing = "echo /dev/nvidia0" if has_gpu else "exit 2"
    real = shutil.which("ls")
    host.add_program("ls", f'#!{shutil.which("bash")}\ncase "$*" in */dev/nvidia*) {listing} ;; *) exec {real} "$@" ;; esac\n')


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_cuda_build_is_announced_with_the_way_to_the_small_one(host: Host, has_gpu: bool) -> None:
    host.add_python("python3", "3.12")
    says_gpu(host, has_gpu)
    code, lines = host.run()
    assert code == 0
    sizes = f"will download up to 3.1 GB (torch 2.13.0, CUDA build, and about 110 other packages) and take 6.3 GB in {host.venv}"
    advice = [
        "This host has no GPU. The CPU build of torch does the same here with 0.7 GB to download and 3.0 GB on disk."
        " To get it, press Ctrl-C, run the next line, and run this command again.",
        f"  export PIP_EXTRA_INDEX_URL={CPU_INDEX}",
    ]
    assert lines[1:-4] == [f"[bootstrap] {line}" for line in [sizes, *([] if has_gpu else advice)]]


def test_an_extra_index_with_the_cpu_build_gives_the_small_build_as_advised(host: Host) -> None:
    """With pip's own choice between 2.13.0 and 2.13.0+cpu."""
    host.add_python("python3", "3.12")
    says_gpu(host, False)
    code, lines = host.run(PIP_EXTRA_INDEX_URL=(host.home / "cpu").as_uri())
    sizes = f"will download up to 0.7 GB (torch 2.13.0, CPU build, and about 110 other packages) and take 3.0 GB in {host.venv}"
    assert (code, lines[1:-4]) == (0, [f"[bootstrap] {sizes}"])


def test_pip_takes_a_local_cuda_build_before_the_cpu_build(host: Host) -> None:
    host.add_python("python3", "3.12")
    index = host.add_index("vendor", "2.13.0+cpu", "2.13.0+cu130", "2.13.0.post1+cpu")
    says_gpu(host, False)
    _, lines = host.run(PIP_EXTRA_INDEX_URL=index)
    assert "CUDA build" in lines[1]
    assert lines[3] == f'[bootstrap]   export PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL {CPU_INDEX}"'


def test_an_index_without_torch_ends_before_anything_is_installed(host: Host) -> None:
    host.add_python("python3", "3.12")
    code, lines = host.run(PIP_INDEX_URL=(host.home / "nowhere").as_uri())
    text = "pip found no torch for this Python. Is there a network? 'pip config list' shows pip's index."
    assert (code, lines[-2:]) == (1, ["ERROR: No matching distribution found for torch", f"[bootstrap] {text}"])
    assert host.installs() == []


def test_too_little_disk_is_said_before_anything_is_installed(host: Host) -> None:
    host.add_python("python3", "3.12")
    host.add_disks({"*": (11_499, "/")})
    code, lines = host.run()
    temporary, cache = host.home / "tmp", host.home / "cache"
    where = f"6.3 GB for {host.venv} (RPP_VENV), 2.1 GB for {temporary} (TMPDIR), 3.1 GB for {cache} (PIP_CACHE_DIR)"
    assert (code, lines[-4:]) == (
        1,
        [
            "[bootstrap] not enough disk space on /: 11.5 GB needed, 11.4 GB free",
            f"[bootstrap] In all: {where}.",
            "[bootstrap] Free some space, or set the variable in parentheses to a folder on another disk.",
            "[bootstrap] PIP_NO_CACHE_DIR=1 turns pip's cache off.",
        ],
    )
    assert host.installs() == []
    host.add_disks({"*": (11_500, "/")})
    assert host.run()[0] == 0


def test_each_file_system_is_asked_for_its_own_share(host: Host) -> None:
    host.add_python("python3", "3.12")
    disks = {"*/.venv": (6_300, "/home"), "*/home": (5_200, "/the rest")}  # tmp and cache do not exist yet: their parent is asked
    host.add_disks(disks)
    assert host.run()[0] == 0
    shutil.rmtree(host.venv)
    host.add_disks(disks | {"*/.venv": (6_299, "/home"), "*/home": (5_100, "/the rest")})
    short = sorted(line for line in host.run()[1] if "not enough" in line)
    assert short == [
        "[bootstrap] not enough disk space on /home: 6.3 GB needed, 6.2 GB free",
        "[bootstrap] not enough disk space on /the rest: 5.2 GB needed, 5.1 GB free",
    ]


def test_without_pips_cache_nothing_is_reserved_for_it(host: Host) -> None:
    host.add_python("python3", "3.12")
    host.add_disks({"*": (8_400, "/")})
    script = host.bin / "python3"
    script.write_text(script.read_text().replace('echo "${FAKE_CACHE:?}"', "exit 1"))
    assert host.run()[0] == 0


def test_every_place_that_names_pythons_names_the_same_ones() -> None:
    script = (ROOT / "tools" / "bootstrap.sh").read_text()
    pythons = re.search(r"^pythons=\((.*?)\)", script, re.M)[1].split()
    assert tuple(tuple(map(int, version.split("."))) for version in pythons) == doctor.PYTHONS
    described = metadata.metadata("megatron_rpp")
    classifiers = [line.rpartition(" ")[2] for line in described.get_all("Classifier") if "Python :: 3." in line]
    assert classifiers == pythons
    assert sorted(described["Requires-Python"].split(",")) == ["<3.14", ">=3.11"]
    for name in ("tools/bootstrap.sh", "README.md"):
        assert f"Python {pythons[0]}, {pythons[1]} or {pythons[2]}" in (ROOT / name).read_text(), name
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in pythons


def libraries_of_torch() -> set[str]:
    """The installed CUDA packages that torch asks for, itself or through cuda-toolkit. Its CPU build has none."""
    installed = {one.metadata["Name"] for one in metadata.distributions()}
    lines = [line for name in {"torch", "cuda-toolkit"} & installed for line in metadata.requires(name) or []]
    return {re.match(r"[\w-]+", line)[0] for line in lines if line.startswith(("nvidia-", "cuda-"))} & installed


def test_the_stated_size_is_that_of_the_pinned_packages() -> None:
    script = (ROOT / "tools" / "bootstrap.sh").read_text()
    stated = dict(re.findall(r"\[(CPU|CUDA)\]=(\d+)", re.search(r"environment_mb=\((.*?)\)", script)[1]))
    lines = [line for name in ("cpu.txt", "dev.txt") for line in (ROOT / "requirements" / name).read_text().splitlines()]
    names = {line.partition("==")[0] for line in lines if "==" in line} | libraries_of_torch()
    files = {Path(file.locate()) for name in names for file in metadata.files(name)}
    measured = sum(path.stat().st_size for path in files if path.exists()) / 1e6
    build = "CPU" if metadata.version("torch").endswith("+cpu") else "CUDA"
    assert 0.8 * int(stated[build]) < measured < int(stated[build])
