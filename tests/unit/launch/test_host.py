"""Counting GPUs without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.host import num_gpus


@pytest.mark.parametrize(
    ("files", "visible", "expected"),
    [
        ([], None, 0),
        ([], "0,1", 0),  # the variable makes no GPU
        (["nvidiactl", "nvidia-uvm", "nvidia-caps"], None, 0),  # a driver without a device
        (["nvidia0", "nvidia1", "nvidia10", "nvidiactl"], None, 3),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "0,-1,1", 1),
        (["nvidia0"], "MIG-aa, MIG-bb", 2),
    ],
)
def test_gpus_are_device_files_that_the_environment_lets_be_seen(
    tmp_path: Path, files: list[str], visible: str | None, expected: int
) -> None:
    for name in files:
        (tmp_path / name).touch()
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert num_gpus(tmp_path, env) == expected
