"""Ties a layout to the tensors of a running Megatron model. Names, layer numbers, shapes and dtypes must all agree."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.layout import MegatronLayout, expert_range
from megatron_rpp.weights.rect import Local

# (name within its pipeline chunk, layer over the whole model from 0 or None outside the layers, parameter or persistent buffer)
Named = tuple[str, int | None, Tensor]

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")
# A routed expert, by its number on this rank: TEGroupedLinear's weight{j}, or a module of its own in SequentialMLP.
_EXPERT = re.compile(r"\.mlp\.experts\.(?:local_experts\.(?P<module>\d+)\.)?(?P<weight>linear_fc\d\.weight)(?P<j>\d*)$")
# Where the local (torch) layer spec has a module of its own, and the Transformer Engine spec a parameter of the next linear layer.
_LOCAL_SPEC = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}


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


@dataclass(frozen=True)
class _Report:
    """What one rank tells the others about its modules. rows: of its vocabulary shard. Each of the last three None: not here."""

    stage: int
    layers: tuple[int, ...]
    host: str
    rows: int | None
    ep: int | None
    etp: int | None


def live_weights(model: Model, named: Iterable[Named], groups: Groups, *, dtype: torch.dtype, deadline_s: float) -> LiveWeights:
    """The layout as the live modules of all ranks have it, and this rank's tensors bound to it. Collective over the world.

    model: from families.registry.describe(hf_config). named: Policy.named_local(). dtype: of every parameter without one of its own.
    The layers of each stage, the padding of the vocabulary, the sharing of experts and the hosts are what the ranks report, not
    what arithmetic says.
    Raises: ConfigError or GeometryError when the modules and the family disagree; DeadlineError.
    """
    named = list(named)
    held = tuple(sorted({layer for _, layer, _ in named if layer is not None}))
    ep, etp = expert_split(model, named)
    mine = _Report(groups.coords.pp, held, socket.gethostname(), vocab_rows(named), ep, etp)
    reports = gather_objects(mine, groups.world_cpu, name="layers of every stage", deadline_s=deadline_s)
    layers: dict[int, tuple[int, ...]] = {}
    for rank, report in enumerate(reports):
        if layers.setdefault(report.stage, report.layers) != report.layers:
            where, expected = f"rank {rank}", layers[report.stage]
            raise GeometryError("ranks of one stage hold different layers", where=where, expected=expected, got=report.layers)
    layout = MegatronLayout(
        model=model,
        tp=groups.tp_size,
        layers=tuple(layers[stage] for stage in sorted(layers)),
        dtype=dtype,
        padded_vocab=_agreed((report.rows for report in reports), "heights of the vocabulary shards") * groups.tp_size,
        replicas=groups.size // (groups.tp_size * groups.pp_size),
        ep=_agreed((report.ep for report in reports), "shares of the experts", default=1),
        etp=_agreed((report.etp for report in reports), "cuts of an expert", default=1),
    )
    hosts = [report.host for report in reports]
    nodes = tuple(hosts.index(host) for host in hosts)
    index = groups.rank % layout.stage_ranks
    own = expert_range(model.dims.experts, layout.ep, index // layout.etp % layout.ep)
    return LiveWeights(layout, groups, nodes, bind(layout.locals(groups.rank), named, first_expert=own.start))


def _agreed(values: Iterable[int | None], what: str, default: int | None = None) -> int:
    """The one value that all ranks report who know it."""
    found = {value for value in values if value is not None} or {default}
    if len(found) != 1 or None in found:
        raise GeometryError(f"ranks report different {what}", where="weights", got=sorted(found - {None}))
    return found.pop()


def vocab_rows(named: Iterable[Named]) -> int | None:
    """Rows of this rank's shard of the vocabulary; None on a stage without one."""
    heights = [tensor.shape[0] for name, _, tensor in named if name in ("embedding.word_embeddings.weight", "output_layer.weight")]
    return heights[0] if heights else None


def expert_split(model: Model, named: Iterable[Named]) -> tuple[int | None, int | None]:
    """(ep, etp) of this rank: how many ranks share the experts, and how many share one. None on a stage without experts.

    Raises: GeometryError when the live experts are no equal share of the model's.
    """
    counts: Counter[str] = Counter()
    etp = None
    for name, layer, tensor in named:
        if layer is None or not _EXPERT.search(name):
            continue
        key = global_name(name, layer)
        counts[key.rstrip("0123456789")] += 1
        described = next((p for p in model.layers[layer] if p.name == key), None) if etp is None else None
        if described is not None:
            etp = described.num_elements // tensor.numel()
    if not counts:
        return None, None
    held = set(counts.values())
    if len(held) != 1 or not model.dims.experts or model.dims.experts % (count := max(held)):
        raise GeometryError("the live experts are no equal share", where="weights", expected=f"of {model.dims.experts}", got=dict(counts))
    return model.dims.experts // count, etp


def bind(expected: Iterable[Local], named: Iterable[Named], *, first_expert: int = 0) -> dict[str, Tensor]:
    """The live tensors under the layout's names, in the layout's order. first_expert: the number of this rank's expert 0.

    Raises: ConfigError for parameters that only one side knows, GeometryError for a wrong shape or dtype; each names them.
    """
    wanted = {local.name: local for local in expected}
    live: dict[str, Tensor] = {}
    for name, layer, tensor in named:
        key = global_name(name, layer, first_expert)
        if key not in wanted and layer is not None:
            prefix = f"decoder.layers.{layer}."
            key = prefix + _LOCAL_SPEC.get(key.removeprefix(prefix), key.removeprefix(prefix))
        if key in live:
            raise ConfigError("two live parameters are the same one", where=key, got=name)
        live[key] = tensor
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


def global_name(name: str, layer: int | None, first_expert: int = 0) -> str:
    """A parameter's name with its layer, and its routed expert, counted over the whole model.

    Raises: ConfigError when a layer's parameter comes without its number, or another one with.
    """
    if (_LAYER.match(name) is None) != (layer is None):
        raise ConfigError("layer number and name disagree", where=name, got=f"layer {layer}")
    if layer is None:
        return name
    name = _LAYER.sub(f"decoder.layers.{layer}.", name)
    expert = _EXPERT.search(name)
    number = (expert["module"] or expert["j"]) if expert else ""
    return f"{name[: expert.start()]}.mlp.experts.{expert['weight']}{first_expert + int(number)}" if expert and number else name
