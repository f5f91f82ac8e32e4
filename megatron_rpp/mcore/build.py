"""From a Hugging Face directory and our settings to Megatron's TransformerConfig and to the model chunks of this rank.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

import difflib
import enum
import itertools
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rpp.config.layout_rules import check_fit, needs_group_choice
from megatron_rpp.config.options import OWNED_MEGATRON
from megatron_rpp.config.schema import Config, Scalar
from megatron_rpp.errors import ConfigError
from megatron_rpp.hf.model import HfModel
from megatron_rpp.mcore.logp_model import LogpModel
from megatron_rpp.mcore.rope import inv_freq
from megatron_rpp.mcore.router import GroupChoice
from megatron_rpp.mcore.shape import shape_settings
from megatron_rpp.mcore.value_model import ValueModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(hf: HfModel, cfg: Config, device: torch.device) -> TransformerConfig:
    """Megatron's configuration of one model.

    Settings come from config.json (shape), `parallel` and `model.dtype`, then `model.megatron` on top of the defaults here.
    Raises: GeometryError when layers or heads do not divide; ConfigError for an unknown or owned name in `model.megatron`, a
    value of the wrong type, or a combination that Megatron refuses.
    """
    check_fit(hf, cfg.parallel, cfg.model.megatron)
    settings = {
        **shape_settings(hf),
        **_layout(cfg),
        **_execution(cfg, device, is_latent=hf.latent is not None),
        **_overrides(cfg.model.megatron),
    }
    try:
        config = (TransformerConfig if hf.latent is None else MLATransformerConfig)(**settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            "Megatron refuses these settings", where="model.megatron", got=error, fix=f"given: {cfg.model.megatron or 'nothing'}"
        ) from error
    return config


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all ranks: the vocabulary rounded up to a multiple of 128 x tp, as Megatron does by default."""
    multiple = 128 * tp
    return -(-vocab_size // multiple) * multiple


def named_tensors(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, int | None, Tensor]]:
    """(name inside its chunk, layer over the whole model from 0 or None outside the layers, tensor) of what this rank holds.

    All parameters, and the routers' biases, which are buffers: a gradient does not reach them, a roll-out engine needs them. Expert
    number j of a name (`mlp.experts.linear_fc1.weight{j}`) counts this rank's own; over the whole model it is
    ep_rank * (experts / ep) + j. The layer is what the live module says it is: uneven and virtual stages make any arithmetic on
    the name wrong.
    """
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        biases = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(".router.expert_bias"))
        for name, tensor in itertools.chain(chunk.named_parameters(), biases):
            is_layer = name.startswith("decoder.layers.")
            yield name, layers[int(name.split(".")[2])] if is_layer else None, tensor


def build_chunks(
    hf: HfModel, config: TransformerConfig, vpp: int, device: torch.device, *, end: Literal["logp", "value"] = "logp"
) -> list[GPTModel]:
    """The model chunks of this rank: one, or `vpp` with virtual pipeline stages. Weights are zero until they are loaded.

    end: what the last stage answers: log-probabilities of tokens, or their values (a critic).
    """
    model, own = {
        "logp": (LogpModel, {"true_vocab_size": hf.vocab_size, "share_embeddings_and_output_weights": hf.is_tied}),
        "value": (ValueModel, {}),
    }[end]
    chunks = []
    for index in range(vpp):
        vp_stage = index if vpp > 1 else None
        chunk = model(
            config=config,
            transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage),
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            rotary_base=hf.rope.theta,
            vp_stage=vp_stage,
            **own,
        ).to(device)  # Megatron leaves the router and the gate of a shared expert on the host
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.zero_()  # padding rows of the vocabulary are never loaded, and must not hold what memory held
        if hf.latent is None:
            chunk.rotary_pos_emb.inv_freq = inv_freq(hf.rope, hf.head_dim).to(device)
        if hf.experts is not None:
            _finish_experts(hf, config, chunk)
        chunks.append(chunk)
    return chunks


def _finish_experts(hf: HfModel, config: TransformerConfig, chunk: GPTModel) -> None:
    """Marks on the experts' weights that Megatron's optimizer reads, and the choice of experts by groups."""
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            # Gradients are summed over the ranks that hold the same experts. Megatron says so for ep > 1 only; where etp differs
            # from tp those ranks are others than dp all the same, and the tp ranks would go on with different weights.
            parameter.allreduce = False
            # Unmarked, the gradient norm takes the experts of tp ranks beyond the first for copies and leaves them out.
            parameter.tensor_model_parallel = True
    if needs_group_choice(hf.router, hf.experts):
        for layer in chunk.decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                layer.mlp.router.router_replay = GroupChoice(hf.router.group_best)


def _layout(cfg: Config) -> dict[str, Any]:
    parallel = cfg.parallel
    dtype = _DTYPES[cfg.model.dtype]
    return dict(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        sequence_parallel=parallel.sp and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # Megatron wants it for variable lengths, experts or not
        # at two stages both neighbours are one peer, and only the overlapping schedule keeps the two apart
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
    )


def _execution(cfg: Config, device: torch.device, *, is_latent: bool) -> dict[str, Any]:
    """Kernels and initialisation. Fused kernels exist on a GPU only."""
    is_cuda = device.type == "cuda"
    return dict(
        # needless for weights that come from a file, but only the initialisers mark which parameters are tensor-parallel
        # shards: without the marks the gradient norm forgets the shards of every tp rank but the first
        perform_initialization=True,
        use_cpu_initialization=not is_cuda,
        apply_rope_fusion=is_cuda and not is_latent,  # for latent attention the kernel knows yarn only
        bias_activation_fusion=is_cuda,
        bias_dropout_fusion=is_cuda,
        # frees a stage's output once its send has been issued: in order on a stream, a race with gloo's still reading thread
        deallocate_pipeline_outputs=is_cuda and cfg.parallel.pp > 1,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _overrides(given: dict[str, Scalar]) -> dict[str, Any]:
    """`model.megatron`, each name known and each value of the type that TransformerConfig declares."""
    known = {field.name for field in fields(TransformerConfig)}
    hints = typing.get_type_hints(TransformerConfig)
    values = {}
    for name, value in given.items():
        where = f"model.megatron.{name}"
        if name in OWNED_MEGATRON:
            raise ConfigError("this cannot be set here", where=where, fix=OWNED_MEGATRON[name])
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            fix = f"did you mean {' or '.join(close)}?" if close else "see TransformerConfig of the installed megatron-core"
            raise ConfigError("megatron-core has no such setting", where=where, fix=fix)
        values[name] = _decode(value, hints[name], where)
    return values


def _decode(value: Scalar, hint: Any, where: str) -> Any:
    """A YAML scalar as the declared type: enum members by name, lists of strings from comma-separated text."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif value is None or isinstance(value, bool) or origin is bool:
            if (value is None and option is type(None)) or (isinstance(value, bool) and origin is bool):
                return value
        elif isinstance(origin, type) and isinstance(value, origin):
            return value
        elif origin is float and isinstance(value, int):
            return float(value)
        elif isinstance(origin, type) and issubclass(origin, enum.Enum) and value in origin.__members__:
            return origin[value]
        elif origin is list and isinstance(value, str) and str in typing.get_args(option):
            return [part.strip() for part in value.split(",")]
    raise ConfigError("a value of the wrong type", where=where, expected=str(hint).replace("typing.", ""), got=repr(value))
