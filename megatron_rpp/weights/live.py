"""Ties a layout to the tensors of a running Megatron model. Names, layer numbers, shapes and dtypes must all agree."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.rect import Local

# (parameter name within its pipeline chunk, layer over the whole model from 0 or None outside the layers, tensor)
Named = tuple[str, int | None, Tensor]

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")


@dataclass(frozen=True)
class LiveWeights:
    """This rank's share of a running model: tensors[local.name] for every local of layout.locals(rank).

    The tensors are the model's own parameters: write to them under torch.no_grad().
    nodes[rank]: which host each rank of the world runs on, so that the planner can prefer near sources.
    """

    layout: MegatronLayout
    groups: Groups
    nodes: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return self.groups.rank

    @property
    def locals(self) -> tuple[Local, ...]:
        """What the layout says this rank holds."""
        return self.layout.locals(self.rank)


def live_weights(model: Model, named: Iterable[Named], groups: Groups, *, dtype: torch.dtype, deadline_s: float) -> LiveWeights:
    """The layout as the live modules of all ranks have it, and this rank's tensors bound to it. Collective over the world.

    model: from families.registry.describe(hf_config). named: Policy.named_local(). dtype: of every parameter.
    The layers of each stage, the padding of the vocabulary and the hosts are what the ranks report, not what arithmetic says.
    Raises: ConfigError or GeometryError when the modules and the family disagree; DeadlineError.
    """
    named = list(named)
    mine = (groups.coords.pp, tuple(sorted({layer for _, layer, _ in named if layer is not None})), vocab_rows(named), socket.gethostname())
    reports = gather_objects(mine, groups.world_cpu, name="layers of every stage", deadline_s=deadline_s)
    layers: dict[int, tuple[int, ...]] = {}
    for rank, (stage, held, _, _) in enumerate(reports):
        if layers.setdefault(stage, held) != held:
            raise GeometryError("ranks of one stage hold different layers", where=f"rank {rank}", expected=layers[stage], got=held)
    rows = {rows for _, _, rows, _ in reports if rows is not None}
    if len(rows) != 1:
        raise GeometryError("vocabulary shards differ in height", where="embedding and output_layer", got=sorted(rows))
    layout = MegatronLayout(
        model=model,
        tp=groups.tp_size,
        layers=tuple(layers[stage] for stage in sorted(layers)),
        dtype=dtype,
        padded_vocab=rows.pop() * groups.tp_size,
        replicas=groups.size // (groups.tp_size * groups.pp_size),
    )
    hosts = [host for _, _, _, host in reports]
    nodes = tuple(hosts.index(host) for host in hosts)
    return LiveWeights(layout, groups, nodes, bind(layout.locals(groups.rank), named))


def vocab_rows(named: Iterable[Named]) -> int | None:
    """Rows of this rank's shard of the vocabulary; None on a stage without one."""
    heights = [tensor.shape[0] for name, _, tensor in named if name in ("embedding.word_embeddings.weight", "output_layer.weight")]
    return heights[0] if heights else None


def bind(expected: Iterable[Local], named: Iterable[Named]) -> dict[str, Tensor]:
    """The live tensors under the layout's names, in the layout's order.

    Raises: ConfigError for parameters that only one side knows, GeometryError for a wrong shape or dtype; each names them.
    """
    live: dict[str, Tensor] = {}
    for name, layer, tensor in named:
        key = global_name(name, layer)
        if key in live:
            raise ConfigError("two live parameters are the same one", where=key, got=name)
        live[key] = tensor
    wanted = {local.name: local for local in expected}
    unknown, missing = sorted(live.keys() - wanted.keys()), sorted(wanted.keys() - live.keys())
    if unknown or missing:
        fix = "the family in weights/families must describe every parameter of the Megatron model, and no other"
        got = f"live but not described: {unknown or 'none'}; described but not live: {missing or 'none'}"
        raise ConfigError("the live model and its family disagree", where="weights", got=got, fix=fix)
    for name, local in wanted.items():
        tensor = live[name]
        if tuple(tensor.shape) != local.shape:
            raise GeometryError("wrong shape", where=name, expected=local.shape, got=tuple(tensor.shape))
        if tensor.dtype != local.dtype:
            raise GeometryError("wrong dtype", where=name, expected=local.dtype, got=tensor.dtype)
    # The parameters themselves and not aliases of their storage: whoever moves memory re-points `parameter.data`.
    return {name: live[name] for name in wanted}


def global_name(name: str, layer: int | None) -> str:
    """A parameter's name with its layer counted over the whole model.

    Raises: ConfigError when a layer's parameter comes without its number, or another one with.
    """
    if (_LAYER.match(name) is None) != (layer is None):
        raise ConfigError("layer number and name disagree", where=name, got=f"layer {layer}")
    return name if layer is None else _LAYER.sub(f"decoder.layers.{layer}.", name)
