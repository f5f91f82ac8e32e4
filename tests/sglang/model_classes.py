"""Program: build SGLang's own model class of a rank on the CPU, load HF tensors with its own load_weights, save the parameters.

    python -m tests.sglang.model_classes FOLDER

FOLDER/cases.json: a list of {"model", "tp", "ep", "attn_dp"}; FOLDER/<model>/config.json and FOLDER/<model>.pt: HF config and
tensors. Written: FOLDER/<number of the case>-<rank>.pt for every rank. No engine, no other process, no process group: a rank
here is what the published configuration says, and its groups are sizes and numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import megatron_rpp_patches

DTYPE = torch.bfloat16


def server_args(folder: Path, case: dict[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(
        model_path=str(folder / case["model"]),
        device="cpu",
        tp_size=case["tp"],
        ep_size=case["ep"],
        dp_size=case["attn_dp"],
        enable_dp_attention=case["attn_dp"] > 1,
        skip_tokenizer_init=True,
        load_format="dummy",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        disable_shared_experts_fusion=True,
        dtype="bfloat16",
    )


def publish(args: Any, rank: int) -> None:
    """This process is engine rank `rank` from here on, as far as a model class can tell."""
    from sglang.srt.layers.dp_attention import initialize_dp_attention_flags
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, reset_context
    from sglang.srt.runtime_context import publish as publish_context

    reset_context()
    publish_context(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    parallel = get_parallel()
    for name in ("tp", "attn_tp", "moe_ep", "moe_tp", "pp"):
        parallel.override_permanently(**{f"{name}_group": _group(getattr(parallel, f"{name}_size"), getattr(parallel, f"{name}_rank"))})
    initialize_moe_config()
    initialize_dp_attention_flags(args)


def _group(size: int, rank: int) -> SimpleNamespace:
    ends = {"is_first_rank": rank == 0, "is_last_rank": rank == size - 1, "cpu_group": None, "device_group": None}
    return SimpleNamespace(world_size=size, rank_in_group=rank, rank=rank, ranks=list(range(size)), **ends)


def build(args: Any, rank: int) -> nn.Module:
    """The model of a rank, without weights."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model

    publish(args, rank)
    torch.set_default_dtype(DTYPE)
    config, load = ModelConfig.from_server_args(args), LoadConfig(load_format="dummy")
    return _initialize_model(config, load, _get_quantization_config(config, load))


def parameters(args: Any, rank: int, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model's own loader makes of the HF tensors."""
    model = build(args, rank)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.load_weights(iter(hf.items()))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(folder: Path) -> None:
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        hf = torch.load(folder / f"{case['model']}.pt")
        args = server_args(folder, case)
        for rank in range(case["tp"]):
            torch.save(parameters(args, rank, hf), folder / f"{number}-{rank}.pt")


if __name__ == "__main__":
    megatron_rpp_patches.apply("sglang")
    main(Path(sys.argv[1]))
