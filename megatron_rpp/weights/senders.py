"""Who sends: of all holders of a flow the nearest, and of equally near ones each as much as keeps the busiest least busy."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from megatron_rpp.weights.flows import Flow


@dataclass(frozen=True, slots=True)
class Lane:
    """Rank `src` sends rank `dst` the share [start, stop) of flow number `flow`, in bytes of the whole flow.

    Of every bucket's section of the flow it is the same share, so that senders of equal rank all work in every bucket.
    """

    flow: int
    src: int
    dst: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def is_local(self) -> bool:
        """True for a copy on one GPU."""
        return self.src == self.dst


def lanes_of(flows: tuple[Flow, ...], nodes: tuple[int, ...]) -> tuple[Lane, ...]:
    """The lanes of all flows: same GPU before same node before another node, then the least loaded.

    Receivers with the same candidates are laid end to end and the line is cut where a candidate has had its fair share: loads
    come out equal to the byte, and a receiver rarely has more than two senders. Flows with a single candidate go first, since
    nothing can be chosen there. Every rank runs this on the same flows and gets the same answer.
    """
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # candidates -> (flow, receiver)
    nearest: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
    for number, flow in enumerate(flows):
        for dst in flow.receivers:
            key = flow.senders, dst
            if key not in nearest:
                nearest[key] = _nearest(flow.senders, dst, nodes)
            queues[nearest[key]].append((number, dst))
    loads: dict[int, int] = defaultdict(int)
    found: list[Lane] = []
    for candidates in sorted(queues, key=len):
        wanted = queues[candidates]
        lanes = _share(flows, wanted, candidates, loads)
        for lane in lanes:
            loads[lane.src] += lane.num_bytes * (not lane.is_local)
        found += lanes
    return tuple(found)


def _nearest(senders: tuple[int, ...], dst: int, nodes: tuple[int, ...]) -> tuple[int, ...]:
    if dst in senders:
        return (dst,)
    return tuple(src for src in senders if nodes[src] == nodes[dst]) or senders


def _share(flows: tuple[Flow, ...], wanted: list[tuple[int, int]], candidates: tuple[int, ...], loads: dict[int, int]) -> list[Lane]:
    """Lanes for receivers that may take from any of the candidates."""
    total = sum(flows[number].num_bytes for number, _ in wanted)
    left = fair_shares([loads[rank] for rank in candidates], total)
    found, turn = [], 0
    for number, dst in wanted:
        start, stop = 0, flows[number].num_bytes
        while start < stop:
            while left[turn] == 0:
                turn += 1
            share = min(left[turn], stop - start)
            found.append(Lane(number, candidates[turn], dst, start, start + share))
            left[turn] -= share
            start += share
    return found


def fair_shares(loads: list[int], total: int) -> list[int]:
    """Splits `total` so that the largest of load + share is as small as can be: fill the lowest first, like water."""
    order = sorted(range(len(loads)), key=lambda i: (loads[i], i))
    held = 0
    for count, i in enumerate(order, 1):
        held += loads[i]
        level, spare = divmod(total + held, count)
        if count == len(order) or level < loads[order[count]]:
            break
    shares = [0] * len(loads)
    for place, i in enumerate(order[:count]):
        shares[i] = level - loads[i] + (place < spare)
    return shares
