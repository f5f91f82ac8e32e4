"""The process groups of one rank, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rpp.dist.layout import Coords, ExpertCoords

__all__ = ["Groups", "ProcessGroup", "ranks_of"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Every group that this rank is a member of. All exist, also where they hold one rank only.

    world: all ranks, the device's backend. world_cpu: all ranks on gloo, for objects and for host tensors.
    dp: ranks that hold other data and the same shard. dp_cp: those and their context-parallel peers: over it, each packed
    token is held exactly once. tp, cp, pp: the usual. model: tp x cp x pp, the ranks that work on one dp rank's batch.

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


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """The global ranks of a group, in the group's own order."""
    return tuple(dist.get_process_group_ranks(group))
