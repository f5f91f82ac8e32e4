"""The process groups of one rank, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rpp.dist.layout import Coords, ExpertCoords

__all__ = ["UNBOUNDED", "Groups", "ProcessGroup", "host_group", "ranks_of"]

# Waits are named and bounded by whoever waits, some for hours (a roll-out). Gloo stops at the lower of that and the group's own
# limit, so that one must never be the lower.
UNBOUNDED = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Groups:
    """Every group that this rank is a member of. All exist, also where they hold one rank only.

    world: all ranks, the device's backend. world_cpu: all ranks on gloo, for objects and for host tensors.
    dp: ranks that hold other data and the same shard. dp_cp: those and their context-parallel peers, who hold the same data and
    answer for other tokens of it: over it, gradients are summed. tp, cp, pp: the usual. model: tp x cp x pp, the ranks that work on
    one dp rank's batch.

    The experts of a layer lie over ep x etp of the tp x cp x dp ranks of a stage. expert_dp: ranks that hold the same experts.
    """

    coords: Coords
    world: ProcessGroup
    world_cpu: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    tp: ProcessGroup
    cp: ProcessGroup
    pp: ProcessGroup
    model: ProcessGroup
    expert_coords: ExpertCoords = field(default_factory=ExpertCoords)
    ep_size: int = 1
    etp_size: int = 1
    expert_dp: ProcessGroup | None = None  # None only in groups made by hand, for models without experts

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return dist.get_rank(self.world)

    @property
    def size(self) -> int:
        """The number of ranks in the run."""
        return dist.get_world_size(self.world)

    @property
    def dp_size(self) -> int:
        return dist.get_world_size(self.dp)

    @property
    def tp_size(self) -> int:
        return dist.get_world_size(self.tp)

    @property
    def cp_size(self) -> int:
        return dist.get_world_size(self.cp)

    @property
    def pp_size(self) -> int:
        return dist.get_world_size(self.pp)

    @property
    def is_last_stage(self) -> bool:
        """True where the logits are."""
        return self.coords.pp == self.pp_size - 1


def host_group(teams: Iterable[Sequence[int]]) -> ProcessGroup | None:
    """The team that this rank is in, on gloo, for objects and host tensors; None for a rank in no team.

    Collective over the world: every rank makes every team's group, in the same order. No rank is in two.
    """
    found = None
    for ranks in teams:
        group = dist.new_group(list(ranks), backend="gloo", timeout=UNBOUNDED)
        found = group if dist.get_rank() in ranks else found
    return found


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """The global ranks of a group, in the group's own order."""
    return tuple(dist.get_process_group_ranks(group))
