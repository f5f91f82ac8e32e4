"""Only megatron.* modules take the CPU for CUDA; everybody else meets torch as it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

OTHERS = """
import json, sys, types
import torch
import megatron_rpp_patches
megatron_rpp_patches.apply("megatron_core")
import megatron.core.parallel_state as inside

def error(call):
    try:
        return repr(call())
    except (AssertionError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"

other = types.ModuleType("megatron_like")
other.__dict__.update(torch=torch)
print(json.dumps({
    "is_available": torch.cuda.is_available(),
    "device_count": torch.cuda.device_count(),
    "accelerator": torch.accelerator.is_available(),
    "current_device": error(torch.cuda.current_device),
    "factory": error(lambda: torch.zeros(1, device="cuda")),
    "tensor": error(lambda: torch.zeros(1).cuda()),
    "module": error(lambda: torch.nn.Linear(1, 1).cuda()),
    "type": torch.zeros(1).type(),
    "convert": torch.zeros(1).type(torch.float64).type(),
    "script": torch.jit.script(torch.nn.Linear(2, 2))(torch.zeros(1, 2)).shape == (1, 2),
    "compiled": torch.compile(lambda x: x.type(torch.float64) + 1, backend="eager")(torch.zeros(1)).item(),
    "other": other.torch is torch,
    "inside": inside.torch is not torch and inside.torch.nn is torch.nn,
    "leaks": [name for name, module in sys.modules.items()
              if not name.startswith("megatron.") and isinstance(module, types.ModuleType) and vars(module).get("torch") is inside.torch],
}))
"""

SGLANG = """
import json
import megatron_rpp_patches
megatron_rpp_patches.apply("sglang")
from sglang.srt.utils import common

NAMES = ("is_cuda", "is_cuda_alike", "is_hip", "is_cpu", "is_xpu", "is_npu", "get_device", "get_device_count")

def answers():
    out = {}
    for name in NAMES:
        function = getattr(common, name)
        getattr(function, "cache_clear", lambda: None)()
        try:
            out[name] = repr(function())
        except Exception as problem:
            out[name] = f"{type(problem).__name__}: {problem}"
    return out

before = answers()
megatron_rpp_patches.apply("megatron_core")
import megatron.core
print(json.dumps([before, answers()]))
"""


def run(code: str) -> object:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen() -> dict:
    return run(OTHERS)


def test_cuda_is_not_there_for_others(seen: dict) -> None:
    assert (seen["is_available"], seen["device_count"], seen["accelerator"]) == (False, 0, False)


@pytest.mark.parametrize("call", ["current_device", "factory", "tensor", "module"])
def test_asking_for_cuda_fails_for_others_as_it_did(seen: dict, call: str) -> None:
    assert seen[call].startswith("AssertionError: Torch not compiled with CUDA enabled"), seen[call]


def test_tensors_have_their_own_types_for_others(seen: dict) -> None:
    assert (seen["type"], seen["convert"]) == ("torch.FloatTensor", "torch.DoubleTensor")


def test_torch_can_still_be_compiled_and_scripted(seen: dict) -> None:
    assert seen["script"]
    assert seen["compiled"] == 1.0


def test_no_module_outside_megatron_holds_the_overlay(seen: dict) -> None:
    assert seen["inside"]
    assert seen["other"]
    assert seen["leaks"] == []


def test_sglang_sees_the_same_machine() -> None:
    before, after = run(SGLANG)
    assert before == after
    assert before["is_cuda"] == "False"
