"""`rpp doctor`: what on this host would stop a run or make it wrong. Only `--clean` changes anything."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_rpp.display import printable, printable_lines
from megatron_rpp.host import num_gpus
from megatron_rpp.leftovers import Leftover, find_leftovers, remove_if_abandoned
from megatron_rpp.search_path import python_module

Status = Literal["ok", "warn", "FAIL"]
Versions = Callable[[str], str | None]
GIB = 2**30
PYTHONS = ((3, 11), (3, 12), (3, 13))  # tools/bootstrap.sh and setup.py name the same ones


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. remedy: what to do about it; empty when the status is ok."""

    name: str
    status: Status
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.name:20} {self.text}" + (f"\n{'':27}-> {self.remedy}" if self.remedy else "")


def main(*, as_json: bool = False, clean: bool = False) -> int:
    """Print every finding; 1 when one of them is a FAIL. clean: first remove what dead runs have left."""
    if clean:
        _remove_leftovers(quiet=as_json)
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            print(printable_lines(str(finding), indent=27), flush=True)
    failed = sum(finding.status == "FAIL" for finding in findings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(f"{len(findings)} checks, {sum(finding.status == 'warn' for finding in findings)} warnings, {failed} failures")
    return int(failed > 0)


def examine() -> Iterator[Finding]:
    """All findings about this host and environment, cheap ones first."""
    has_gpu = num_gpus() > 0
    yield check_python(sys.version_info[:2])
    yield from check_packages(_pins(), installed_version)
    yield check_transformer_engine(installed_version("transformer-engine"), has_gpu=has_gpu)
    yield check_apex(installed_version("apex"), has_kernels=importlib.util.find_spec("amp_C") is not None, has_gpu=has_gpu)
    yield check_plugin({entry.name for entry in metadata.entry_points(group="sglang.srt.plugins")})
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    yield check_shared_memory(shm.free if shm else 0)
    yield check_memory(_memory_bytes(), num_cores=len(os.sched_getaffinity(0)))
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_leftovers(find_leftovers())
    yield _check_cuda(has_gpu=has_gpu)
    yield _check_patches()


def installed_version(name: str) -> str | None:
    """The version of an installed distribution without its local part (2.13.0+cpu is 2.13.0); None when it is absent."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check_python(version: tuple[int, ...]) -> Finding:
    if version not in PYTHONS:
        text = f"{'.'.join(map(str, version))}; Python 3.11, 3.12 or 3.13 is needed"
        return Finding("python", "FAIL", text, "recreate the environment with one of these: bash tools/bootstrap.sh")
    return Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}")


def check_packages(pins: dict[str, str], installed: Versions) -> Iterator[Finding]:
    """pins: name -> specifier as in setup.py. Only `==` pins are tested sets; a lower bound is a bound."""
    for name, specifier in pins.items():
        version = installed(name)
        if version is None:
            yield Finding(
                name, "FAIL", f"not installed, {specifier} is needed", f"pip install '{name}{specifier}', or run tools/bootstrap.sh"
            )
        elif not _fits(version, specifier):
            yield Finding(
                name, "FAIL", f"{version}, tested with {specifier}", f"pip install '{name}{specifier}', or run tools/bootstrap.sh"
            )
        else:
            yield Finding(name, "ok", version)


def check_transformer_engine(version: str | None, *, has_gpu: bool) -> Finding:
    name = "transformer-engine"
    if has_gpu and version is None:
        return Finding(name, "FAIL", "not installed, and this host has a GPU", "pip install -r requirements/gpu.txt")
    if not has_gpu and version is not None:
        return Finding(
            name,
            "FAIL",
            f"{version} on a host without a GPU: megatron-core cannot be imported beside it",
            "pip uninstall transformer-engine",
        )
    return Finding(name, "ok", version or "absent, as it must be without a GPU")


def check_apex(version: str | None, *, has_kernels: bool, has_gpu: bool) -> Finding:
    if version is not None and not has_kernels:
        return Finding("apex", "warn", f"{version} has no fused kernels; PyPI's `apex` is another project", "pip uninstall apex")
    if has_gpu and version is None:
        return Finding(
            "apex", "warn", "absent: the optimiser runs without fused kernels, correct but slower", "build NVIDIA/apex from source"
        )
    return Finding("apex", "ok", version or "absent, and without use on a CPU")


def check_plugin(names: set[str]) -> Finding:
    if "megatron_rpp" not in names:
        return Finding(
            "sglang plugin", "FAIL", "not registered: SGLang's processes would run unpatched", "pip install --no-deps -e . again"
        )
    return Finding("sglang plugin", "ok", "registered as megatron_rpp")


def check_shared_memory(free_bytes: int) -> Finding:
    text = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < GIB:
        return Finding(
            "/dev/shm", "warn", f"{text}: engines and NCCL pass tensors through it", "in a container: --shm-size=16g or --ipc=host"
        )
    return Finding("/dev/shm", "ok", text)


def check_memory(memory_bytes: int, *, num_cores: int) -> Finding:
    text = f"{memory_bytes / GIB:.1f} GiB memory, {num_cores} cores"
    if memory_bytes < 8 * GIB:
        return Finding("host", "warn", f"{text}: the quickstart takes about 6 GiB", "close other programs, or use a larger host")
    return Finding("host", "ok", text)


def check_open_files(limit: int) -> Finding:
    if 0 <= limit < 4096:
        return Finding("open files", "warn", f"at most {limit}", "ulimit -n 65536 before the run")
    return Finding("open files", "ok", f"at most {limit}" if limit >= 0 else "no limit")


def check_leftovers(found: Sequence[Leftover]) -> Finding:
    """What dead runs of this user have left."""
    if not found:
        return Finding("left behind", "ok", "nothing of dead runs in TMPDIR and /dev/shm")
    shared = [path for leftover in found for path in leftover.shared]
    size = sum(leftover.num_bytes for leftover in found) / 2**20
    text = f"by dead runs: {len(found)} folders, {len(shared)} entries of {size:.1f} MiB in /dev/shm"
    paths = [str(path) for leftover in found for path in (leftover.folder, *leftover.shared)]
    return Finding("left behind", "warn", "".join([text, *(f"\n{'':27}   {path}" for path in paths)]), "rpp doctor --clean")


def _remove_leftovers(*, quiet: bool) -> None:
    for leftover in find_leftovers():
        if remove_if_abandoned(leftover.folder) and not quiet:
            for path in (*leftover.shared, leftover.folder):
                print(printable(f"removed {path}"))


def _pins() -> dict[str, str]:
    """The exact versions that the installed metadata of megatron_rpp asks for under the extra `train`."""
    lines = metadata.requires("megatron_rpp") or []
    matches = [re.match(r'([A-Za-z0-9._-]+)((?:==|>=)[^;]+?)\s*(?:;.*extra == "train".*)?$', line) for line in lines]
    return {match[1]: match[2].strip() for match in matches if match}


def _fits(version: str, specifier: str) -> bool:
    wanted = specifier.lstrip("=>")
    if specifier.startswith("=="):
        return version == wanted
    return _release(version) >= _release(wanted)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split(".") if part)


def _memory_bytes() -> int:
    """What this process may use: the host's memory, or the container's limit where that is lower."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return host if text == "max" else min(host, int(text))


_CUDA = """
from torch import cuda, version
count = cuda.device_count()
print(version.cuda, count, *{cuda.get_device_name(index) for index in range(count)})
"""


def _check_cuda(*, has_gpu: bool) -> Finding:
    """In a process of its own: a broken driver can end the one that asks."""
    try:
        result = subprocess.run([sys.executable, "-P", "-c", _CUDA], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Finding("cuda", "FAIL", "torch did not answer within 120 s", "look at the driver: nvidia-smi")
    if result.returncode != 0:
        last = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        return Finding("cuda", "FAIL", f"torch cannot be imported: {last}", "run tools/bootstrap.sh")
    build, count, *names = result.stdout.split()
    if int(count):
        return Finding("cuda", "ok", f"{count} x {' '.join(names)}, CUDA {build}")
    if has_gpu:
        fix = (
            "this torch is a CPU build: pip install torch==2.13.0"
            if build == "None"
            else "look at the driver: nvidia-smi; and at CUDA_VISIBLE_DEVICES"
        )
        return Finding("cuda", "FAIL", "this host has a GPU that torch cannot use", fix)
    return Finding("cuda", "ok", "no GPU: everything runs on the CPU, for small models")


def _check_patches() -> Finding:
    """By the patches' own account, in a process of its own: what it imports must not stay."""
    try:
        result = subprocess.run([*python_module("megatron_rpp_patches"), "status"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Finding("patches", "FAIL", "no answer within 120 s", "python -m megatron_rpp_patches status")
    lines = result.stdout.splitlines()
    if result.returncode == 0 and lines:
        inactive = sum("inactive:" in line for line in lines)
        return Finding("patches", "ok", f"{len(lines) - inactive} needed here and fit their sources, {inactive} inactive")
    stale = [
        line.split()[0] for line in lines if "EXPIRED" in line or not re.search("source as reviewed|no source to lock|not installed", line)
    ]
    last = (result.stderr.strip().splitlines() or ["no patches found"])[-1]
    text = f"stale: {', '.join(stale)}" if stale else f"cannot be examined: {last}"
    return Finding("patches", "FAIL", text, "python -m megatron_rpp_patches status; review the upstream change, then `... lock`")
