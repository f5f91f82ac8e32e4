"""Where buckets begin and end, what is in one, and where in a message each rectangle lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.flows import Flow
from megatron_rpp.weights.rect import Local, Piece, Rect
from megatron_rpp.weights.senders import Lane

ALIGN_BYTES = 8  # the widest element that a message may hold
_GRAINS = 1024  # rows are cut only where they are wider than this fraction of a bucket


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
    """Transfers that travel together. `completed[rank]` are the tensors of that rank whose last element this bucket brings.

    A rank's own view has that rank's transfers and tensors only.
    """

    transfers: tuple[Transfer, ...]
    completed: Mapping[int, tuple[Local, ...]]

    @cached_property
    def _by_pair(self) -> dict[tuple[int, int], tuple[Transfer, ...]]:
        pairs: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for transfer in self.transfers:
            pairs[transfer.src, transfer.dst].append(transfer)
        # Wider elements first: every segment of a message then starts at a multiple of its own element size.
        return {pair: tuple(sorted(pairs[pair], key=lambda t: -t.dtype.itemsize)) for pair in sorted(pairs)}

    def between(self, src: int, dst: int) -> tuple[Transfer, ...]:
        """Transfers from src to dst in the order in which they lie in the message."""
        return self._by_pair.get((src, dst), ())

    def message_bytes(self, src: int, dst: int) -> int:
        """Length of the message from src to dst: its transfers, rounded up so that the next message starts aligned."""
        payload = sum(transfer.num_bytes for transfer in self.between(src, dst))
        return -(-payload // ALIGN_BYTES) * ALIGN_BYTES

    def outbox(self, rank: int) -> Iterator[tuple[Transfer, int]]:
        """What a rank sends, and the byte at which each lies: one message after another by receiver, none to itself."""
        return self._placed([pair for pair in self._by_pair if pair[0] == rank != pair[1]])

    def inbox(self, rank: int) -> Iterator[tuple[Transfer, int]]:
        """What a rank receives, and the byte at which each lies: one message after another by sender, its own copies last."""
        pairs = [pair for pair in self._by_pair if pair[1] == rank]
        return self._placed(sorted(pairs, key=lambda pair: (pair[0] == rank, pair[0])))

    def _placed(self, pairs: list[tuple[int, int]]) -> Iterator[tuple[Transfer, int]]:
        starts = accumulate((self.message_bytes(*pair) for pair in pairs), initial=0)
        for pair, at in zip(pairs, starts, strict=False):
            for transfer in self._by_pair[pair]:
                yield transfer, at
                at += transfer.num_bytes

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank puts on the wire; copies on one GPU do not count."""
        return sum(self.message_bytes(*pair) for pair in self._by_pair if pair[0] == rank != pair[1])

    def received_bytes(self, rank: int) -> int:
        """Bytes that a rank takes off the wire."""
        return sum(self.message_bytes(*pair) for pair in self._by_pair if pair[1] == rank != pair[0])

    def inbox_bytes(self, rank: int) -> int:
        """Bytes of everything that a rank gets, its own copies included."""
        return self.received_bytes(rank) + self.message_bytes(rank, rank)


@dataclass(frozen=True)
class Sections:
    """How every flow is cut into `count` buckets: bucket k has the positions cuts[flow][k] to cuts[flow][k + 1]."""

    cuts: tuple[tuple[int, ...], ...]
    count: int

    def of(self, lane: Lane, total: int, bucket: int) -> tuple[int, int]:
        """Positions in the flow (`total` bytes long) of a lane's share of a bucket."""
        start, stop = self.cuts[lane.flow][bucket : bucket + 2]
        return start + (stop - start) * lane.start // total, start + (stop - start) * lane.stop // total


def grain_bytes(bucket_bytes: int) -> int:
    """The widest row that is never cut."""
    return bucket_bytes // _GRAINS


def cut_evenly(flows: tuple[Flow, ...], lanes: tuple[Lane, ...], bucket_bytes: int) -> Sections:
    """The same fraction of every flow in every bucket, and as few buckets as the busiest rank allows.

    So each rank sends and receives in a bucket what it does on average over all of them, whichever stage it is in.
    Raises: GeometryError when bucket_bytes does not even hold what rounding to rows and to the alignment may add.
    """
    steps = [flow.step_bytes(grain_bytes(bucket_bytes)) for flow in flows]
    load: dict[tuple[str, int], int] = defaultdict(int)
    slack: dict[tuple[str, int], int] = defaultdict(int)
    for lane in lanes:
        ends = [("receive", lane.dst)] if lane.is_local else [("receive", lane.dst), ("send", lane.src)]
        for end in ends:
            load[end] += lane.num_bytes
            # Its start may fall back by a step, its two divisions lose a byte each, its message is padded.
            slack[end] += steps[lane.flow] + 2 + ALIGN_BYTES
    if slack and max(slack.values()) >= bucket_bytes:
        fix = "raise the bucket size: every rank takes part in every bucket"
        raise GeometryError("buckets are too small", where="planner", expected=f"> {max(slack.values())} bytes", got=bucket_bytes, fix=fix)
    count = max((-(-load[end] // (bucket_bytes - slack[end])) for end in load), default=0)
    cuts = tuple(tuple(flow.num_bytes * k // count for k in range(count + 1)) for flow in flows)
    return Sections(cuts, count)


def cut_between_tensors(
    flows: tuple[Flow, ...], lanes: tuple[Lane, ...], *, names: list[str], stage: Callable[[int], int], bucket_bytes: int
) -> Sections:
    """Every tensor of `names` whole in one bucket, spread over the stages; sorts the parts of each flow by bucket.

    A tensor larger than bucket_bytes travels alone.
    """
    numbers, count = _fill(flows, lanes, _spread(flows, names, stage), bucket_bytes)
    cuts = []
    for flow in flows:
        flow.arrange(sorted(flow.parts, key=lambda part: numbers[part.local.name]))
        sizes = [0] * count
        for part in flow.parts:
            sizes[numbers[part.local.name]] += part.num_bytes
        cuts.append(tuple(accumulate(sizes, initial=0)))
    return Sections(tuple(cuts), count)


def _fill(flows: tuple[Flow, ...], lanes: tuple[Lane, ...], names: list[str], bucket_bytes: int) -> tuple[dict[str, int], int]:
    """The bucket of each name: the names in order, a new bucket whenever one would not fit for some rank."""
    lanes_of = defaultdict(list)
    for lane in lanes:
        lanes_of[lane.flow].append(lane)
    sizes: dict[str, dict[int, int]] = {name: defaultdict(int) for name in names}
    for number, flow in enumerate(flows):
        for part in flow.parts:
            sizes[part.local.name][number] += part.num_bytes
    steps = [flow.step_bytes(grain_bytes(bucket_bytes)) for flow in flows]
    numbers: dict[str, int] = {}
    bucket, load = 0, defaultdict(int)
    for name in names:
        more: dict[tuple[str, int], int] = defaultdict(int)
        for number, size in sizes[name].items():
            for lane in lanes_of[number]:
                is_whole = lane.num_bytes == flows[number].num_bytes
                share = size if is_whole else min(size, size * lane.num_bytes // flows[number].num_bytes + steps[number] + 2)
                more["receive", lane.dst] += share
                if not lane.is_local:
                    more["send", lane.src] += share
        if numbers and any(load[end] and load[end] + size > bucket_bytes for end, size in more.items()):
            bucket, load = bucket + 1, defaultdict(int)
        numbers[name] = bucket
        for end, size in more.items():
            load[end] += size
    return numbers, bucket + 1 if numbers else 0


def _spread(flows: tuple[Flow, ...], names: list[str], stage: Callable[[int], int]) -> list[str]:
    """Names in an order in which all stages progress together.

    In model order one stage would send while the others wait. A tensor's place is the fraction of its own stage's bytes that
    come before its middle, so any run of the order takes nearly the same share of every stage.
    """
    shares: dict[str, dict[int, int]] = {name: defaultdict(int) for name in names}
    for flow in flows:
        sender = stage(flow.senders[0])
        for part in flow.parts:
            shares[part.local.name][sender] += part.num_bytes * len(flow.receivers)
    total: dict[int, int] = defaultdict(int)
    stage_of, place = {}, {}
    for name in names:
        stage_of[name] = max(shares[name], key=lambda one: (shares[name][one], -one), default=0)
        size = sum(shares[name].values())
        place[name] = total[stage_of[name]] + size / 2
        total[stage_of[name]] += size
    return sorted(names, key=lambda name: (place[name] / max(total[stage_of[name]], 1), stage_of[name]))
