"""A small GPTModel, the same function of its names on every layout, trained one step on packed sequences."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import megatron_rpp_patches

LENGTHS = ((5, 12, 7), (9, 2, 6, 3))  # the sequences of two microbatches, 24 and 20 tokens: multiples of 4 for TP2 x CP2
VOCAB = 64


@dataclass(frozen=True)
class Layout:
    """A parallel layout and the model's options."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # TransformerConfig fields
    lengths: tuple[tuple[int, ...], ...] = LENGTHS


def start(layout: Layout) -> None:
    """Patches, Megatron's process groups and seeds, in the order a rank does it."""
    megatron_rpp_patches.apply("megatron_core")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,  # gloo cannot gather unequal numbers of tokens
    )
    model_parallel_cuda_manual_seed(7)


def config(layout: Layout) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    options = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,
        "use_cpu_initialization": False,
        "pipeline_dtype": torch.float32,
        "expert_tensor_parallel_size": 1,
        **layout.options,
    }
    kind = MLATransformerConfig if options.get("multi_latent_attention") else TransformerConfig
    return kind(
        **options,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
    )


def build(layout: Layout, **ddp: Any) -> Any:
    """This rank's part of the model under DistributedDataParallel, its weights set from their names."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    settings = config(layout)
    settings.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        settings,
        get_gpt_decoder_block_spec(settings, use_transformer_engine=True),
        vocab_size=VOCAB,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    for name, param in model.named_parameters():
        param.data.copy_(shard(weight(name_of(model, name), full_shape(name, param)), name, param))
    return DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp), model)


def name_of(model: Any, name: str) -> str:
    """A parameter's name with the global number of its layer and expert."""
    from megatron.core import parallel_state

    def layer(match: re.Match) -> str:
        return f"layers.{model.decoder.layers[int(match[1])].layer_number - 1}."

    def expert(match: re.Match) -> str:
        local = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        return f"weight{int(match[1]) + local * parallel_state.get_expert_model_parallel_rank()}"

    name = re.sub(r"layers\.(\d+)\.", layer, name)
    return re.sub(r"weight(\d+)$", expert, name)


def _group(name: str) -> Any:
    from megatron.core import parallel_state

    is_expert = ".experts." in name
    return parallel_state.get_expert_tensor_parallel_group() if is_expert else parallel_state.get_tensor_model_parallel_group()


def is_split(name: str, param: Any) -> bool:
    return getattr(param, "tensor_model_parallel", False) and _group(name).size() > 1


def full_shape(name: str, param: Any) -> list[int]:
    shape = list(param.shape)
    if is_split(name, param):
        shape[param.partition_dim] *= _group(name).size()
    return shape


def weight(name: str, shape: list[int]) -> torch.Tensor:
    """The whole tensor of this name, whatever the layout."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.1 * noise if len(shape) == 1 and "norm" in name else 0.1 * noise


def shard(full: torch.Tensor, name: str, param: Any) -> torch.Tensor:
    """This rank's part. A gated first layer holds its part of the gate, then its part of the rest."""
    if not is_split(name, param):
        return full
    group = _group(name)
    halves = full.chunk(param.partition_stride)
    return torch.cat([half.chunk(group.size(), param.partition_dim)[group.rank()] for half in halves])


def gather_full(local: torch.Tensor, name: str, param: Any) -> torch.Tensor:
    """The inverse of `shard`, over the tensor-parallel ranks."""
    if not is_split(name, param):
        return local
    parts = [torch.empty_like(local) for _ in range(_group(name).size())]
    dist.all_gather(parts, local.contiguous(), group=_group(name))
    if param.partition_stride == 1:
        return torch.cat(parts, param.partition_dim)
    return torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])


def batches(layout: Layout) -> list[dict[str, Any]]:
    """Microbatches of packed sequences; under context parallel this rank's two chunks of each."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    out = []
    for number, lengths in enumerate(layout.lengths):
        total = sum(lengths)
        tokens = torch.randint(0, VOCAB, (total + 1,), generator=torch.Generator().manual_seed(number))
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        place = torch.arange(total)
        if layout.cp > 1:
            rank = parallel_state.get_context_parallel_rank()
            chunks = [part.chunk(2 * layout.cp) for part in place.split(lengths)]
            place = torch.cat([torch.cat([part[rank], part[-1 - rank]]) for part in chunks])
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
        )
        out.append({"tokens": tokens[:-1][place][None], "labels": tokens[1:][place][None], "packed": packed})
    return out


def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    positions = torch.zeros_like(batch["tokens"])
    loss_T = model(batch["tokens"], positions, None, labels=batch["labels"], packed_seq_params=batch["packed"])

    def loss_func(loss_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return loss_T.sum(), torch.tensor(loss_T.numel(), dtype=torch.int), {"loss": loss_T.detach().double().sum()}

    return loss_T, loss_func


def step(layout: Layout, model: Any) -> torch.Tensor:
    """Forward and backward of all microbatches; the loss summed over tokens, on every rank."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.zero_grad_buffer()
    data = batches(layout)
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(data),
        model=model,
        num_microbatches=len(data),
        seq_length=max(map(sum, layout.lengths)),
        micro_batch_size=1,
        forward_only=False,
    )
    loss = torch.stack([torch.zeros((), dtype=torch.float64), *(item["loss"] for item in sums)]).sum()
    dist.all_reduce(loss)
    return loss * layout.pp * layout.cp / dist.get_world_size()  # every other axis holds copies


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Whole gradients by global name, equal on all ranks."""
    mine = {name_of(model.module, name): gather_full(param.main_grad, name, param) for name, param in model.module.named_parameters()}
    theirs: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(theirs, mine)
    return {name: grad for each in reversed(theirs) for name, grad in each.items()}


def grad_norm(model: Any) -> float:
    """The norm by which Megatron clips."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    return get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.0, weight_decay=0.0, clip_grad=1e9), [model]).step()[1]


def losses_and_gradients(rank: int, layouts: list[Layout]) -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """What each rank runs: one step on every layout, one after the other. Only rank 0 returns the gradients."""
    out = []
    for layout in layouts:
        start(layout)
        model = build(layout)
        loss = float(step(layout, model))
        grads = gradients(model)
        out.append((loss, grad_norm(model), grads if rank == 0 else {}))
        stop()
    return out


def stop() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
