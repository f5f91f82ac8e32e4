"""From two layouts to the list of copies between them: rectangle intersection, one source for each element, in buckets.

Pure and deterministic: every rank computes the whole plan from the same two layouts, nothing is broadcast. What varies
between models and layouts is in the rectangles; nothing here knows a model.
Source: rectangle intersection as in Megatron-Core's core/resharding; that one plans on rank 0 from gathered metadata, knows
one pipeline chunk a rank, and keeps to Megatron's own layouts.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.layout import Layout
from megatron_rpp.weights.rect import Local, Piece, Rect, check_disjoint

BUCKET_BYTES = 512 * 2**20
ALIGN_BYTES = 8  # the widest element that a message may hold


@dataclass(frozen=True, slots=True)
class Transfer:
    """One rectangle from one tensor of rank `src` into one tensor of rank `dst` (equal ranks: a copy on the GPU).

    dtype: on the wire, the receiver's; the sender casts while it packs.
    """

    rect: Rect
    src: int
    src_local: str
    src_piece: Piece
    dst: int
    dst_local: str
    dst_piece: Piece
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the rectangle on the wire."""
        return self.rect.area * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Transfers that travel together. `completed[rank]` are the tensors of that rank which this bucket fills, whole."""

    transfers: tuple[Transfer, ...]
    completed: Mapping[int, tuple[Local, ...]]

    @cached_property
    def _by_pair(self) -> dict[tuple[int, int], tuple[Transfer, ...]]:
        pairs: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for transfer in self.transfers:
            pairs[transfer.src, transfer.dst].append(transfer)
        # Wider elements first: every segment of a block then starts at a multiple of its own element size.
        return {pair: tuple(sorted(found, key=lambda t: -t.dtype.itemsize)) for pair, found in pairs.items()}

    @property
    def is_local(self) -> bool:
        """True when no rank has anything for another, as where every holder has the whole model. The same on all ranks."""
        return all(src == dst for src, dst in self._by_pair)

    def between(self, src: int, dst: int) -> tuple[Transfer, ...]:
        """Transfers from src to dst in the order in which they lie in the message."""
        return self._by_pair.get((src, dst), ())

    def message_bytes(self, src: int, dst: int) -> int:
        """Length of the message from src to dst: its transfers, rounded up so that the next message starts aligned."""
        payload = sum(transfer.num_bytes for transfer in self.between(src, dst))
        return -(-payload // ALIGN_BYTES) * ALIGN_BYTES if src != dst else 0

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank puts on the wire; copies on one GPU do not count."""
        return sum(self.message_bytes(*pair) for pair in self._by_pair if pair[0] == rank)

    def received_bytes(self, rank: int) -> int:
        """Bytes that a rank takes off the wire."""
        return sum(self.message_bytes(*pair) for pair in self._by_pair if pair[1] == rank)


@dataclass(frozen=True)
class Plan:
    """All transfers between two layouts over `ranks` ranks."""

    ranks: int
    buckets: tuple[Bucket, ...]

    @cached_property
    def digest(self) -> str:
        """Equal on two ranks exactly when they will exchange the same bytes in the same order."""
        text = "\n".join(repr(bucket.transfers) for bucket in self.buckets)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def transfers(self) -> Iterator[Transfer]:
        """Those of all buckets, in order."""
        return (transfer for bucket in self.buckets for transfer in bucket.transfers)

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank puts on the wire in all buckets."""
        return sum(bucket.sent_bytes(rank) for bucket in self.buckets)


@lru_cache(maxsize=8)
def plan(src: Layout, dst: Layout, *, nodes: tuple[int, ...] | None = None, bucket_bytes: int = BUCKET_BYTES) -> Plan:
    """The transfers that fill every tensor of `dst` from `src`.

    Each rectangle comes from one rank: the same GPU before the same node before another node, then the one that has sent
    least. nodes[rank]: node of each rank, None when all share one. A tensor is never split over buckets, so that the receiver
    can hand on whole ones. Cached by the value of the arguments: the plan of a run is made once.
    Units: bucket_bytes bounds what any rank sends, and what it receives, in a bucket; a tensor larger than that travels alone.
    For all stages to send in every bucket it must be several times pp x the largest tensor.
    Raises: GeometryError when src does not hold some element of dst, or holds it in overlapping rectangles.
    """
    ranks = max(src.ranks, dst.ranks)
    nodes = nodes or (0,) * ranks
    if len(nodes) != ranks:
        raise GeometryError("one node for each rank", where="planner", expected=ranks, got=len(nodes))
    sources = _Sources(src, nodes)
    by_name: dict[str, list[Transfer]] = {}
    filled: dict[str, dict[int, Local]] = defaultdict(dict)
    for rank in range(dst.ranks):
        for local in dst.locals(rank):
            filled[local.name][rank] = local
            transfers = by_name.setdefault(local.name, [])
            for piece in local.pieces:
                transfers += sources.fetch(rank, local, piece)
    return Plan(ranks, tuple(_buckets(src, by_name, filled, bucket_bytes)))


class _Sources:
    """The holders of every HF rectangle in a layout, and what each rank has been asked to send so far."""

    def __init__(self, layout: Layout, nodes: tuple[int, ...]) -> None:
        self._nodes = nodes
        self._sent: dict[int, int] = defaultdict(int)
        # HF tensor -> distinct rectangle of it -> (rank, local name, piece) of all that hold it
        self._holders: dict[str, dict[Rect, list[tuple[int, str, Piece]]]] = defaultdict(lambda: defaultdict(list))
        for rank in range(layout.ranks):
            for local in layout.locals(rank):
                for piece in local.pieces:
                    self._holders[piece.rect.hf][piece.rect].append((rank, local.name, piece))

    def fetch(self, rank: int, local: Local, piece: Piece) -> list[Transfer]:
        """The transfers that fill one piece of one local tensor of `rank`."""
        found = []
        for rect, holders in self._holders[piece.rect.hf].items():
            part = piece.rect.intersect(rect)
            if part is None:
                continue
            src, name, src_piece = min(holders, key=lambda holder: self._cost(holder[0], rank))
            transfer = Transfer(part, src, name, src_piece, rank, local.name, piece, local.dtype)
            self._sent[src] += transfer.num_bytes * (src != rank)
            found.append(transfer)
        check_disjoint(transfer.rect for transfer in found)
        covered = sum(transfer.rect.area for transfer in found)
        if covered != piece.rect.area:
            where = f"{local.name} on rank {rank}"
            raise GeometryError(f"no source holds all of {piece.rect.span}", where=where, expected=piece.rect.area, got=covered)
        return found

    def _cost(self, src: int, dst: int) -> tuple[bool, bool, int, int]:
        return (src != dst, self._nodes[src] != self._nodes[dst], self._sent[src], src)


def _buckets(
    src: Layout, by_name: Mapping[str, list[Transfer]], filled: Mapping[str, Mapping[int, Local]], bucket_bytes: int
) -> Iterator[Bucket]:
    """Cut the tensors, spread over the pipeline stages, into runs of at most bucket_bytes for every rank."""
    names: list[str] = []
    load: dict[tuple[str, int], int] = defaultdict(int)
    for name in _spread(src, by_name):
        more: dict[tuple[str, int], int] = defaultdict(int)
        for transfer in by_name[name]:
            more["receive", transfer.dst] += transfer.num_bytes
            if transfer.src != transfer.dst:
                more["send", transfer.src] += transfer.num_bytes
        if names and any(load[end] + count > bucket_bytes for end, count in more.items()):
            yield _bucket(names, by_name, filled)
            names, load = [], defaultdict(int)
        names.append(name)
        for end, count in more.items():
            load[end] += count
    if names:
        yield _bucket(names, by_name, filled)


def _bucket(names: list[str], by_name: Mapping[str, list[Transfer]], filled: Mapping[str, Mapping[int, Local]]) -> Bucket:
    completed: dict[int, list[Local]] = defaultdict(list)
    for name in names:
        for rank, local in filled[name].items():
            completed[rank].append(local)
    transfers = tuple(transfer for name in names for transfer in by_name[name])
    return Bucket(transfers, {rank: tuple(found) for rank, found in completed.items()})


def _spread(src: Layout, by_name: Mapping[str, list[Transfer]]) -> list[str]:
    """Names in an order in which all stages progress together.

    In model order one stage would send while the others wait. A tensor's place is the fraction of its own stage's bytes that
    come before its middle, so any run of the order takes nearly the same share of every stage.
    """
    stage_of, size = {}, {}
    for name, transfers in by_name.items():
        shares: dict[int, int] = defaultdict(int)
        for transfer in transfers:
            shares[src.stage(transfer.src)] += transfer.num_bytes
        stage_of[name] = max(shares, key=lambda stage: (shares[stage], -stage), default=0)
        size[name] = sum(shares.values())
    total: dict[int, int] = defaultdict(int)
    place = {}
    for name in by_name:
        place[name] = total[stage_of[name]] + size[name] / 2
        total[stage_of[name]] += size[name]
    return sorted(by_name, key=lambda name: (place[name] / max(total[stage_of[name]], 1), stage_of[name]))
