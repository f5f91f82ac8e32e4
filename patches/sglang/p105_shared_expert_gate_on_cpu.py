"""The gate of Qwen2-MoE's shared expert on a CPU, in plain torch.

SGLang computes it in one Triton kernel on every device but NPUs and AMX:

    out[t, :] += sigmoid(sum_k hidden[t, k] * gate[k]) * shared[t, :]

in float32, rounded to the dtype of `out` at the end. Each token's sum is over its own row, so it does not depend on the batch.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator


def add_gated(hidden: Tensor, gate: Tensor, shared: Tensor, out: Tensor) -> None:
    """The equation above, in place. Shapes: hidden, shared, out [T, hidden]; gate [hidden]"""
    score = (hidden.to(torch.float32) * gate.to(torch.float32)).sum(dim=-1, keepdim=True)
    out.copy_(out.to(torch.float32) + score.sigmoid() * shared.to(torch.float32))


def _make(original: Callable[..., None]) -> Callable[..., None]:
    def fused_gate_sigmoid_mul_add(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor) -> None:
        add = add_gated if hidden_states.device.type == "cpu" else original
        add(hidden_states, gate_weight, shared_output, final_hidden_states)

    return fused_gate_sigmoid_mul_add


def _probe() -> None:
    add = importlib.import_module("sglang.kernels.ops.elementwise.elementwise").fused_gate_sigmoid_mul_add
    out = torch.tensor([[1.0, 2.0]])
    add(torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, -1.0]), torch.tensor([[10.0, 20.0]]), out)
    assert out.tolist() == [[6.0, 12.0]], out  # sigmoid(0) = 1/2


PATCH = Patch(
    id="p105-shared-expert-gate-on-cpu",
    library="sglang",
    target="sglang.kernels.ops.elementwise.elementwise:fused_gate_sigmoid_mul_add",
    kind="wrap",
    why="Qwen2-MoE fails at its first token on a CPU: the shared expert's gate is a Triton kernel (0 active drivers)",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="Qwen2MoeSparseMoeBlock.forward has a CPU leg for the gate",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_the_gate_of_a_shared_expert_wants_a_gpu_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
