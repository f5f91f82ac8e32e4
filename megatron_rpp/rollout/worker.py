"""What runs inside SGLang's own processes: the patches, and word to the server that they stand.

The only importer of the patches in this folder. `install` runs in the server before its first import of sglang; each
scheduler process inherits the patches before it unpickles anything (megatron_rpp_patches._imports.Inheritance), starts
through `run_scheduler`, and leaves a report in the engine's private folder that the server reads before it serves.
"""

from __future__ import annotations

import json
import os
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import megatron_rpp_patches
from megatron_rpp import leftovers
from megatron_rpp.rollout.settings import FOLDER_VARIABLE

PATCH_SET = "sglang"


def install() -> None:
    """Arm the patches in this process and in all that it starts."""
    megatron_rpp_patches.apply(PATCH_SET, role="server")
    list_shared_memory()


def run_scheduler(server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, pp_rank: int, *rest: Any, **named: Any) -> None:
    """SGLang's scheduler process, after a report that every patch stands in it."""
    write_report("scheduler", f"tp{tp_rank}-pp{pp_rank}")
    list_shared_memory()
    from sglang.srt.managers.load_snapshot import shm_path_for

    leftovers.list_shared(folder(), Path(shm_path_for(port_args.instance_id)).name)
    if server_args.device == "cpu":
        from megatron_rpp.rollout import cpu_attention

        cpu_attention.register()
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(server_args, port_args, gpu_id, tp_rank, pp_rank, *rest, **named)


def list_shared_memory() -> None:
    """From here on, list the semaphores and segments that this process makes in the engine's folder, so that they
    can be removed if the engine is killed."""
    register = resource_tracker.register

    def list_and_register(name: str, kind: str) -> None:
        leftovers.list_shared(folder(), f"sem.{name.lstrip('/')}" if kind == "semaphore" else name)
        register(name, kind)

    resource_tracker.register = list_and_register


def write_report(role: str, rank: str) -> dict[str, Any]:
    """Verify the patches here and put who we are and what stands into the engine's folder. Raises: PatchError."""
    rows = [dict(row, role=role) for row in megatron_rpp_patches.verify(PATCH_SET)]
    report = {"pid": os.getpid(), "role": role, "rank": rank, "patches": rows}
    write_json(folder() / f"worker-{role}-{rank}.json", report)
    return report


def read_reports() -> list[dict[str, Any]]:
    """Every report in the engine's folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder().glob("worker-*.json"))]


def folder() -> Path:
    """The engine's private folder, made by the client, removed with the engine."""
    return Path(os.environ[FOLDER_VARIABLE])


def write_json(path: Path, value: object) -> None:
    """Write a file that a reader sees whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value), encoding="utf-8")
    draft.replace(path)
