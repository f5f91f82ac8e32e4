"""CUDA's inter-process handles on a real GPU. No tier of tests/run.sh: run `pytest tests/gpu` where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.two_processes import BUCKETS, VISIBLE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LEAK_BYTES = 2**20  # a handle that is opened anew for each bucket maps 64 MiB each time


def run(**env: str) -> dict:
    line = [sys.executable, "-m", "tests.gpu.two_processes"]
    folder = Path(__file__).parents[2]
    done = subprocess.run(line, env=os.environ | env, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_every_bucket_arrives_bitwise_and_none_is_left_open(allocator: str) -> None:
    result = run(**({"PYTORCH_CUDA_ALLOC_CONF": allocator} if allocator else {}))
    assert result["equal"] == [True] * BUCKETS, result["last"]
    assert result["code"] == 0
    assert result["used"][-1] - result["used"][2] < LEAK_BYTES


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_reader_finds_the_gpu_under_another_number() -> None:
    result = run(CUDA_VISIBLE_DEVICES="0,1", **{VISIBLE: "1,0"})
    assert result["equal"] == [True] * BUCKETS, result["last"]
    assert result["last"]["device"] == "cuda:1"


def test_a_reader_that_does_not_see_the_gpu_says_so() -> None:
    assert "does not see" in run(**{VISIBLE: ""})["last"]["error"]
