"""What a rank of a gloo run needs for a live model without Megatron: process groups and named parameters."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from megatron_rpp.config.schema import Parallel
from megatron_rpp.dist.groups import Groups
from megatron_rpp.dist.layout import coords_of
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.live import LiveWeights, Named, live_weights
from tests.unit.weights.models import filled, random_hf

DEADLINE_S = 30.0


def groups_of(parallel: Parallel) -> Groups:
    """The groups that the weights look at; the others are the world."""
    world, coords = dist.group.WORLD, coords_of(dist.get_rank(), parallel)
    mine = {}
    for axis in ("tp", "pp"):
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(dist.get_world_size()):
            at = coords_of(rank, parallel)
            rest = tuple(getattr(at, other) for other in ("tp", "cp", "dp", "pp") if other != axis)
            lines.setdefault(rest, []).append(rank)
        for ranks in lines.values():
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine[axis] = group
    return Groups(coords, world, world, dp=world, dp_cp=world, tp=mine["tp"], cp=world, pp=mine["pp"], model=world)


def named(layout: MegatronLayout, rank: int) -> list[Named]:
    """The parameters of a rank as live modules of one chunk name them: layers, and experts, counted from 0 in each."""
    tensors = filled(layout, random_hf(layout.model, layout.dtype))[rank]
    own = layout.layers[layout.stage(rank)]
    share = layout.model.dims.experts // layout.ep
    found: list[Named] = []
    for local in layout.locals(rank):
        layer = int(local.name.split(".")[2]) if ".layers." in local.name else None
        name = local.name if layer is None else re.sub(r"layers\.\d+", f"layers.{own.index(layer)}", local.name)
        if expert := re.search(r"\.experts\.linear_fc\d\.weight(?P<number>\d+)$", name):
            name = name[: expert.start("number")] + str(int(expert["number"]) % share)
        found.append((name, layer, tensors[local.name]))
    return found


def live_of(layout: MegatronLayout, parallel: Parallel) -> LiveWeights:
    groups = groups_of(parallel)
    return live_weights(layout.model, named(layout, groups.rank), groups, dtype=torch.float32, deadline_s=DEADLINE_S)
