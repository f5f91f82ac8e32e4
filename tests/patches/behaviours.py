"""What each patch of Megatron-Core is for, as a check that fails without it.

`python -m tests.patches.behaviours` applies all patches and runs every check twice: with its patch and without it. It
prints, as JSON, what each raised ("" for nothing).
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import megatron_rpp_patches
from megatron_rpp_patches import _core
from megatron_rpp_patches.megatron_core import p050_optimizer_state

SET = "megatron_core"
DENSE = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "normalization": "RMSNorm", "add_bias_linear": False}
MLA = {
    **DENSE,
    "multi_latent_attention": True,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 4,
}


def seeding() -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)


def clipping() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([param], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def swiglu_is_eager() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    importlib.reload(fused_bias_swiglu)  # the decorator acts when the module runs
    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"), "swiglu is compiled"


def streams() -> None:
    """A stream goes on where it stopped, apart from all others and from the default."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 5)
    tracker.add("b", 6)
    drawn = {"a": [], "b": []}
    before = torch.get_rng_state()
    for name in "abba":
        with tracker.fork(name):
            drawn[name].append(torch.rand(3))
    for name, seed in (("a", 5), ("b", 6)):
        assert torch.equal(torch.cat(drawn[name]), torch.rand(6, generator=torch.Generator().manual_seed(seed))), name
    assert torch.equal(before, torch.get_rng_state())


def forks_are_quiet() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addHandler(handler)
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 5)
    with tracker.fork("a"):
        torch.rand(1)
    logger.warning("something else")
    logger.removeHandler(handler)
    assert said == ["something else"], said


def recomputing() -> None:
    """A checkpoint whose output is thrown away and made again gives the gradient of the plain call."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    checkpoint = CheckpointWithoutOutput()
    squared = checkpoint.checkpoint(lambda value: value * value, x)
    loss = squared * 3.0
    checkpoint.discard_output_and_register_recompute(loss)
    loss.sum().backward()
    torch.testing.assert_close(x.grad, 6.0 * x.detach())


def routing() -> None:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    assert router_gating_linear(x, weight, None, torch.float32).tolist() == [[11.0, 17.0]]


def split_sizes() -> None:
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    splits = maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert type(splits).__module__ == "numpy", type(splits)
    assert splits.tolist() == [1, 2]


def _config(options: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    return (MLATransformerConfig if "multi_latent_attention" in options else TransformerConfig)(**options)


def _build(options: dict[str, Any]) -> None:
    seeding()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlock

    config = _config(options)
    TransformerBlock(config, get_gpt_decoder_block_spec(config, use_transformer_engine=True))


def build_layer() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    get_gpt_layer_with_transformer_engine_spec()


def build_experts() -> None:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    get_moe_module_spec(use_te=True, num_experts=2, moe_grouped_gemm=False)


def norm_under_sequence_parallel() -> None:
    from megatron.core.transformer import transformer_block

    config = _config({**DENSE, "tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert transformer_block.LayerNormImpl(config=config, hidden_size=8).weight.sequence_parallel


CHECKS: dict[str, Callable[[], None]] = {
    "p001-torch-overlay": seeding,
    "p002-tensor-methods": clipping,
    "p010-jit-fuser": swiglu_is_eager,
    "p020-rng-state": streams,
    "p021-rng-warning": forks_are_quiet,
    "p030-recompute-fp8": recomputing,
    "p040-moe-router": routing,
    "p041-moe-splits": split_sizes,
    "p050-optimizer-start": p050_optimizer_state._probe_start,
    "p051-optimizer-keep-step": p050_optimizer_state._probe_keep,
    "p052-optimizer-own-step": p050_optimizer_state._probe_own,
    "p080-spec-provider": build_experts,
    "p081-spec-gpt-provider": build_layer,
    "p082-spec-gpt-norm": lambda: _build(DENSE),
    "p083-spec-block-norm": norm_under_sequence_parallel,
    "p084-spec-mla-linear": lambda: _build(MLA),
}


def outcome(check: Callable[[], None]) -> str:
    """What a check raised, in a line."""
    try:
        check()
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def main() -> dict[str, list[str]]:
    megatron_rpp_patches.apply(SET)
    from megatron.core import parallel_state

    megatron_rpp_patches.verify(SET)
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        results = {}
        for name, check in CHECKS.items():
            entry = _core._ENTRIES[SET][name]
            with_patch = outcome(check)
            entry.disable()
            results[name] = [with_patch, outcome(check)]
            entry.enable()
        swiglu_is_eager()  # the last reload was without its patch
        megatron_rpp_patches.verify(SET)
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main()) + "\n")
