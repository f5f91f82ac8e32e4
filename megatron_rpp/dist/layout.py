"""Which rank does what: pure arithmetic, no process group.

Rank order is Megatron's default "tp-cp-ep-dp-pp": tp varies fastest, pp slowest. Experts see the same ranks of a stage in
another order, "etp-ep-edp".
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config.schema import Parallel
from megatron_rpp.errors import GeometryError


@dataclass(frozen=True, slots=True)
class Coords:
    """Where one rank stands in each direction of the layout."""

    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0


@dataclass(frozen=True, slots=True)
class ExpertCoords:
    """Where one rank stands among the ranks of its stage that hold experts. edp: which copy of its share it holds."""

    etp: int = 0
    ep: int = 0
    edp: int = 0


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Consecutive ranks whose accelerators one roll-out engine uses. The first of them, the leader, owns its process."""

    index: int
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        return self.ranks[0]

    def local_ids(self, places: tuple[int, ...], *, local_rank: int) -> tuple[int, ...]:
        """What the ranks at some places of this group are called on their host. local_rank: what the leader is."""
        return tuple(local_rank + place - self.leader for place in places)


def world_size_of(parallel: Parallel) -> int:
    """How many ranks a layout needs: tp * cp * dp * pp."""
    return parallel.tp * parallel.cp * parallel.dp * parallel.pp


def coords_of(rank: int, parallel: Parallel) -> Coords:
    """The coordinates of a rank; the inverse of `rank_of`.

    rank = tp + TP * (cp + CP * (dp + DP * pp))
    Raises: GeometryError when the layout has no such rank.
    """
    size = world_size_of(parallel)
    if not 0 <= rank < size:
        raise GeometryError(
            "no such rank in this layout",
            where="parallel",
            expected=f"a rank in [0, {size}), as tp {parallel.tp} x cp {parallel.cp} x dp {parallel.dp} x pp {parallel.pp} = {size}",
            got=rank,
            fix="start exactly that many processes, or change the parallel section",
        )
    rest, tp = divmod(rank, parallel.tp)
    rest, cp = divmod(rest, parallel.cp)
    pp, dp = divmod(rest, parallel.dp)
    return Coords(tp=tp, cp=cp, dp=dp, pp=pp)


def expert_coords_of(rank: int, parallel: Parallel) -> ExpertCoords:
    """The expert coordinates of a rank. Rank ep of E experts holds [ep * E / EP, (ep + 1) * E / EP), cut in ETP parts.

    rank in its stage = etp + ETP * (ep + EP * edp)
    Raises: GeometryError when the layout has no such rank, or ep x etp does not divide the ranks of a stage.
    """
    coords_of(rank, parallel)
    stage, share = parallel.tp * parallel.cp * parallel.dp, parallel.ep * parallel.etp
    if stage % share:
        raise GeometryError(
            "the experts do not divide over the ranks of a stage",
            where="parallel.ep",
            expected=f"ep x etp to divide tp {parallel.tp} x cp {parallel.cp} x dp {parallel.dp} = {stage}",
            got=f"ep {parallel.ep} x etp {parallel.etp} = {share}",
        )
    rest, etp = divmod(rank % stage, parallel.etp)
    edp, ep = divmod(rest, parallel.ep)
    return ExpertCoords(etp=etp, ep=ep, edp=edp)


def rank_of(coords: Coords, parallel: Parallel) -> int:
    """The rank at some coordinates: tp + TP * (cp + CP * (dp + DP * pp)).

    Raises: GeometryError when a coordinate lies outside the layout.
    """
    for axis in ("tp", "cp", "dp", "pp"):
        index, size = getattr(coords, axis), getattr(parallel, axis)
        if not 0 <= index < size:
            raise GeometryError(f"{axis} coordinate is outside the layout", where="parallel", expected=f"0 <= {axis} < {size}", got=index)
    return coords.tp + parallel.tp * (coords.cp + parallel.cp * (coords.dp + parallel.dp * coords.pp))


def num_engines(world_size: int, rollout_tp: int, engines: int | None) -> int:
    """How many engines a run has; None asks for one for every `rollout_tp` ranks.

    Raises: GeometryError when they do not fit on the ranks.
    """
    if engines is None:
        if world_size % rollout_tp:
            raise GeometryError(
                "the ranks do not divide into engines",
                where="rollout.tp",
                expected=f"a divisor of the {world_size} ranks",
                got=rollout_tp,
                fix="choose another rollout.tp, or set rollout.engines and leave some ranks without one",
            )
        return world_size // rollout_tp
    if engines < 1 or engines * rollout_tp > world_size:
        raise GeometryError(
            "the engines do not fit on the ranks",
            where="rollout.engines",
            expected=f"between 1 and {world_size // rollout_tp} engines of {rollout_tp} ranks each, in {world_size} ranks",
            got=engines,
        )
    return engines


def engine_groups(rollout_tp: int, engines: int) -> tuple[EngineGroup, ...]:
    """All engine groups in order; group e holds ranks [e * rollout_tp, (e + 1) * rollout_tp)."""
    return tuple(EngineGroup(e, tuple(range(e * rollout_tp, (e + 1) * rollout_tp))) for e in range(engines))


def engine_group(rank: int, rollout_tp: int, engines: int) -> EngineGroup | None:
    """The engine group that a rank belongs to; None for a rank beyond the last engine."""
    index = rank // rollout_tp
    return engine_groups(rollout_tp, engines)[index] if index < engines else None
