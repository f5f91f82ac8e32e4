"""From two layouts to the list of copies between them: rectangle intersection, one source for each element, in buckets.

Pure and deterministic: every rank works out from the same two layouts who sends what to whom, for groups of equal ranks at
once, and lists only the transfers that it takes part in; nothing is broadcast. What varies between models and layouts is in
the rectangles; nothing here knows a model.
Source: rectangle intersection as in Megatron-Core's core/resharding; that one plans on rank 0 from gathered metadata, knows
one pipeline chunk a rank, and keeps to Megatron's own layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.buckets import Bucket, Sections, Transfer, cut_between_tensors, cut_evenly, grain_bytes
from megatron_rpp.weights.flows import Flow, Group, flows_between, groups_of
from megatron_rpp.weights.layout import Layout
from megatron_rpp.weights.rect import Local
from megatron_rpp.weights.senders import Lane, lanes_of

BUCKET_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Plan:
    """The transfers between two layouts over `ranks` ranks: all of them, or those of one rank.

    is_local: no rank has anything for another, as where every holder has the whole model. The same on all ranks.
    """

    ranks: int
    buckets: tuple[Bucket, ...]
    schedule: Schedule
    is_local: bool

    @property
    def digest(self) -> str:
        """Equal on two ranks exactly when they will exchange the same bytes in the same order, whatever each one's view."""
        return self.schedule.digest

    @property
    def transfers(self) -> Iterator[Transfer]:
        """Those of all buckets, in order."""
        return (transfer for bucket in self.buckets for transfer in bucket.transfers)

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank puts on the wire in all buckets."""
        return sum(bucket.sent_bytes(rank) for bucket in self.buckets)

    def received_bytes(self, rank: int) -> int:
        """Bytes that a rank takes off the wire in all buckets."""
        return sum(bucket.received_bytes(rank) for bucket in self.buckets)


@dataclass(frozen=True, eq=False)
class Schedule:
    """What all ranks agree on, before anyone lists transfers: flows, who sends which share of them, and where they are cut."""

    sources: tuple[Group, ...]
    targets: tuple[Group, ...]
    flows: tuple[Flow, ...]
    lanes: tuple[Lane, ...]
    sections: Sections
    grain_bytes: int

    @cached_property
    def digest(self) -> str:
        """Hash of the whole schedule."""
        found = hashlib.sha256(repr((self.grain_bytes, self.sections.cuts)).encode())
        for lane in self.lanes:
            found.update(repr((lane.flow, lane.src, lane.dst, lane.start, lane.stop)).encode())
        for flow in self.flows:
            for part in flow.parts:
                places = [(number, name, at.row, at.col, at.index) for number, (name, at) in part.held.places.items()]
                rect, at = part.rect, part.piece
                wanted = (part.local.name, str(part.local.dtype), at.row, at.col, at.index)
                found.update(repr((rect.hf, rect.row, rect.col, rect.rows, rect.cols, wanted, places)).encode())
        return found.hexdigest()

    @cached_property
    def _group_of(self) -> dict[int, int]:
        return {rank: number for number, group in enumerate(self.sources) for rank in group.ranks}

    def transfers(self, bucket: int, lanes: tuple[Lane, ...]) -> tuple[Transfer, ...]:
        """What travels on some lanes in one bucket."""
        found = []
        for lane in lanes:
            flow, group = self.flows[lane.flow], self._group_of[lane.src]
            start, stop = self.sections.of(lane, flow.num_bytes, bucket)
            for part, rect in flow.between(start, stop, self.grain_bytes):
                src_local, src_piece = part.held.places[group]
                wanted = part.local
                found.append(Transfer(rect, lane.src, src_local, src_piece, lane.dst, wanted.name, part.piece, wanted.dtype))
        return tuple(found)

    def completed(self, buckets: list[tuple[Transfer, ...]], rank: int | None) -> list[dict[int, tuple[Local, ...]]]:
        """For each bucket the tensors whose last element it brings, on `rank` or on all; those of padding alone with the first."""
        last: dict[tuple[int, str], int] = {}
        for number, transfers in enumerate(buckets):
            last |= {(t.dst, t.dst_local): number for t in transfers if rank in (None, t.dst)}
        found: list[dict[int, list[Local]]] = [{} for _ in buckets]
        for group in self.targets if buckets else ():
            for one in group.ranks if rank is None else {rank}.intersection(group.ranks):
                for local in group.locals:
                    found[last.get((one, local.name), 0)].setdefault(one, []).append(local)
        return [{one: tuple(whole) for one, whole in by_rank.items()} for by_rank in found]


@lru_cache(maxsize=8)
def plan(
    src: Layout,
    dst: Layout,
    *,
    rank: int | None = None,
    nodes: tuple[int, ...] | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    whole_tensors: bool = False,
) -> Plan:
    """The transfers that fill every tensor of `dst` from `src`: those that `rank` sends or receives, or all of them (None).

    Each rectangle comes from the same GPU before the same node before another node; equally near holders share it so that
    the busiest sends as little as can be. nodes[rank]: node of each rank, None when all share one.
    whole_tensors: False cuts tensors, so that every bucket holds the same fraction of what any rank has for any other. True
    keeps each tensor in one bucket, for receivers that hand on whole ones; one larger than a bucket then travels alone, and
    for all stages to send in every bucket this must be several times pp x the largest tensor.
    Cached by the value of the arguments: the plan of a run is made once.
    Units: bucket_bytes bounds what any rank sends, and what it gets (copies on its own GPU included), in a bucket.
    Raises: GeometryError when src does not hold some element of dst, or holds it in overlapping rectangles; when buckets are
    too small to cut anything.
    """
    ranks = max(src.ranks, dst.ranks)
    found = _schedule(src, dst, nodes or (0,) * ranks, bucket_bytes, whole_tensors)
    lanes = found.lanes if rank is None else tuple(lane for lane in found.lanes if rank in (lane.src, lane.dst))
    transfers = [found.transfers(number, lanes) for number in range(found.sections.count)]
    buckets = tuple(map(Bucket, transfers, found.completed(transfers, rank)))
    return Plan(ranks, buckets, found, all(lane.is_local for lane in found.lanes))


@lru_cache(maxsize=4)
def _schedule(src: Layout, dst: Layout, nodes: tuple[int, ...], bucket_bytes: int, whole_tensors: bool) -> Schedule:
    ranks = max(src.ranks, dst.ranks)
    if len(nodes) != ranks:
        raise GeometryError("one node for each rank", where="planner", expected=ranks, got=len(nodes))
    sources, targets = groups_of(src), groups_of(dst)
    flows = flows_between(sources, targets)
    lanes = lanes_of(flows, nodes)
    if whole_tensors:
        sections = cut_between_tensors(flows, lanes, names=_names(targets), stage=src.stage, bucket_bytes=bucket_bytes)
    else:
        sections = cut_evenly(flows, lanes, bucket_bytes)
    return Schedule(sources, targets, flows, lanes, sections, grain_bytes(bucket_bytes))


def _names(targets: tuple[Group, ...]) -> list[str]:
    """Of all tensors, each once, in model order."""
    every: dict[str, Local] = {}
    for group in targets:
        every |= {local.name: local for local in group.locals}
    return list(every)
