"""What this host has, told by its device files: torch, which knows better, takes seconds to ask. And the state of a process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path


def num_gpus(devices: Path = Path("/dev"), env: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that a process started from here may use: the device files, or fewer by CUDA_VISIBLE_DEVICES."""
    found = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return found
    entries = [entry.strip() for entry in visible.split(",")]
    usable = entries.index("-1") if "-1" in entries else len(entries)  # CUDA stops reading at the first invalid entry
    return usable if visible.strip() else 0


def state_of(pid: int) -> str:
    """What the kernel says of a process, as "in state stopped"; "gone" if there is none."""
    import psutil

    try:
        return f"in state {psutil.Process(pid).status()}"
    except psutil.NoSuchProcess:
        return "gone"
