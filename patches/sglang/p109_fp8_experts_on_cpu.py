"""Routed experts in block FP8 on a CPU, as the CUDA kernels compute them.

Each product is that of p107; the input of the second one, silu(gate) * up, is quantised anew:

    h[t]   = silu(gate) * up,   gate, up = the halves of linear(x[t], w13[e])
    out[t] = sum over the experts e of t, in ascending order, of weight[t, e] * linear(h[t], w2[e])

in float32, then cast to the dtype of x; h has the dtype of x in between, as on CUDA.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.sglang._host import has_accelerator
from megatron_rpp_patches.sglang.p107_fp8_linear_on_cpu import GROUP, linear


def experts(x: Tensor, layer: Any, weights: Tensor, ids: Tensor) -> Tensor:
    """out of the docstring above. Shapes: x [tokens, hidden], weights and ids [tokens, k]; an id below 0 is another rank's."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = linear(x[token], layer.w13_weight[expert], layer.w13_weight_scale_inv[expert]).to(x.dtype).chunk(2, dim=-1)
        part = linear(silu(gate) * up, layer.w2_weight[expert], layer.w2_weight_scale_inv[expert])
        out.index_add_(0, token, part * weights[token, slot, None])
    return out.to(x.dtype)


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, layer: Any, dispatch_output: Any) -> Any:
        x = dispatch_output.hidden_states
        if x.device.type != "cpu":
            return original(self, layer, dispatch_output)
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        config = self.moe_runner_config
        known = (config.activation, config.is_gated, config.apply_router_weight_on_input, self.weight_block_size)
        if known != ("silu", True, False, [GROUP, GROUP]) or config.routed_scaling_factor not in (None, 1.0):
            raise ValueError(f"not an expert that p109 computes: {config}, blocks {self.weight_block_size}")
        weights, ids, _ = dispatch_output.topk_output
        return StandardCombineInput(hidden_states=experts(x, layer, weights, ids))

    return apply


def _probe() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod

    assert getattr(Fp8MoEMethod.apply, "__rpp_patch__", None) == PATCH.id, Fp8MoEMethod.apply


PATCH = Patch(
    id="p109-fp8-experts-on-cpu",
    library="sglang",
    target="sglang.srt.layers.quantization.fp8:Fp8MoEMethod.apply",
    kind="wrap",
    why="experts in block FP8 fail on a CPU without AMX: the Triton runner they are given to needs a GPU",
    upstream="not reported: SGLang supports CPUs through its own AMX engine only",
    versions=">=0.5.21,<0.5.22",
    remove_when="Fp8MoEMethod.apply has a CPU leg that quantises activations and needs no AMX",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_fp8_experts_have_no_kernel_on_a_cpu_without_the_patch",
    make=_make,
    inactive=has_accelerator,
)
