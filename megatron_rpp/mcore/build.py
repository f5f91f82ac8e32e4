"""From a Hugging Face directory and our settings to Megatron's TransformerConfig and to the model chunks of this rank.

Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

import difflib
import enum
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_rpp.config.options import OWNED_MEGATRON
from megatron_rpp.config.schema import Config, Parallel, Scalar
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.mcore.hf_config import HfModel, inv_freq
from megatron_rpp.mcore.logp_model import LogpModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Fields by which a user splits the layers unevenly; Megatron then checks the arithmetic.
_UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def transformer_config(hf: HfModel, cfg: Config, device: torch.device) -> TransformerConfig:
    """Megatron's configuration of one model.

    Settings come from config.json (shape), `parallel` and `model.dtype`, then `model.megatron` on top of the defaults here.
    Raises: GeometryError when layers or heads do not divide; ConfigError for an unknown or owned name in `model.megatron`, a
    value of the wrong type, or a combination that Megatron refuses.
    """
    _check_geometry(hf, cfg.parallel, cfg.model.megatron)
    settings = {**_shape(hf), **_layout(cfg), **_execution(cfg, device), **_overrides(cfg.model.megatron)}
    try:
        return TransformerConfig(**settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            "Megatron refuses these settings", where="model.megatron", got=error, fix=f"given: {cfg.model.megatron or 'nothing'}"
        ) from error


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all ranks: the vocabulary rounded up to a multiple of 128 x tp, as Megatron does by default."""
    multiple = 128 * tp
    return -(-vocab_size // multiple) * multiple


def named_parameters(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, int | None, Tensor]]:
    """(name inside its chunk, layer over the whole model from 0 or None outside the layers, tensor) of this rank's parameters.

    The layer is what the live module says it is: uneven and virtual stages make any arithmetic on the name wrong.
    """
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            is_layer = name.startswith("decoder.layers.")
            yield name, layers[int(name.split(".")[2])] if is_layer else None, parameter


def build_chunks(hf: HfModel, config: TransformerConfig, vpp: int) -> list[LogpModel]:
    """The model chunks of this rank: one, or `vpp` with virtual pipeline stages. Weights are zero until they are loaded."""
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    chunks = []
    for index in range(vpp):
        vp_stage = index if vpp > 1 else None
        chunk = LogpModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf.is_tied,
            position_embedding_type="rope",
            rotary_base=hf.rope.theta,
            vp_stage=vp_stage,
            true_vocab_size=hf.vocab_size,
        )
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.zero_()  # padding rows of the vocabulary are never loaded, and must not hold what memory held
        chunk.rotary_pos_emb.inv_freq = inv_freq(hf).to(chunk.rotary_pos_emb.inv_freq.device)
        chunks.append(chunk)
    return chunks


def _shape(hf: HfModel) -> dict[str, Any]:
    return dict(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.family.qkv_bias,
        qk_layernorm=hf.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _layout(cfg: Config) -> dict[str, Any]:
    parallel = cfg.parallel
    dtype = _DTYPES[cfg.model.dtype]
    return dict(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
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


def _execution(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Kernels and initialisation. Fused kernels exist on a GPU only."""
    is_cuda = device.type == "cuda"
    return dict(
        # needless for weights that come from a file, but only the initialisers mark which parameters are tensor-parallel
        # shards: without the marks the gradient norm forgets the shards of every tp rank but the first
        perform_initialization=True,
        use_cpu_initialization=not is_cuda,
        apply_rope_fusion=is_cuda,
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


def _check_geometry(hf: HfModel, parallel: Parallel, overrides: dict[str, Scalar]) -> None:
    """What must divide, said with the numbers, before Megatron says it with an assertion."""
    if hf.num_heads % parallel.tp:
        raise GeometryError(
            "the attention heads do not divide", where="parallel.tp", expected=f"a divisor of the {hf.num_heads} heads", got=parallel.tp
        )
    if hf.num_heads % hf.num_kv_heads:
        raise GeometryError(
            "query heads do not divide into groups", where="config.json", expected=f"a multiple of {hf.num_kv_heads}", got=hf.num_heads
        )
    if hf.num_kv_heads % parallel.tp and parallel.tp % hf.num_kv_heads:
        raise GeometryError(
            "the key-value heads do not divide",
            where="parallel.tp",
            expected=f"a divisor or a multiple of the {hf.num_kv_heads} key-value heads",
            got=parallel.tp,
        )
    if hf.ffn_hidden_size % parallel.tp:
        raise GeometryError(
            "the feed-forward width does not divide", where="parallel.tp", expected=f"a divisor of {hf.ffn_hidden_size}", got=parallel.tp
        )
    stages = parallel.pp * parallel.vpp
    is_uneven = any(overrides.get(name) for name in _UNEVEN)
    if hf.num_layers % stages and not is_uneven:
        raise GeometryError(
            "the layers do not divide over the pipeline",
            where="parallel.pp",
            expected=f"a divisor of the {hf.num_layers} layers",
            got=f"pp {parallel.pp} x vpp {parallel.vpp} = {stages}",
            fix="or say how to split them, with model.megatron.num_layers_in_first_pipeline_stage and ..._last_...",
        )
