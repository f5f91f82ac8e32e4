"""What every rank needs of the others, for groups of equal ranks at once: the intersection of two layouts.

Ranks with equal tensors (replicas, engines) are one group, so the work is that of one replica and one engine, however many
there are. A `Flow` is everything that the ranks of one group want and the same set of groups holds: a queue of rectangles
that may be cut anywhere, into buckets by position and into shares by sender.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.layout import Layout
from megatron_rpp.weights.rect import Local, Piece, Rect, check_disjoint


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that hold equal tensors."""

    ranks: tuple[int, ...]
    locals: tuple[Local, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """One rectangle of the source: under which name and where in it each group has it. `groups` are the keys of `places`."""

    rect: Rect
    groups: tuple[int, ...]
    places: dict[int, tuple[str, Piece]]


@dataclass(frozen=True, slots=True)
class Part:
    """The common rectangle of what a group holds and of one piece of what another wants."""

    rect: Rect
    held: Held
    local: Local
    piece: Piece

    @property
    def num_bytes(self) -> int:
        """Bytes of the rectangle in the receiver's dtype."""
        return self.rect.area * self.local.dtype.itemsize


class Flow:
    """Parts that the source groups `holders` all have and that every rank of `receivers` wants, one after another.

    Positions in a flow are bytes from its start. `row_bytes` is the widest row at which it can be cut.
    """

    def __init__(self, holders: tuple[int, ...], senders: tuple[int, ...], receivers: tuple[int, ...], parts: list[Part]) -> None:
        self.holders, self.senders, self.receivers = holders, senders, receivers
        self.arrange(parts)

    def arrange(self, parts: list[Part]) -> None:
        """Sets the order of the parts."""
        self.parts = parts
        self._starts = list(accumulate((part.num_bytes for part in parts), initial=0))

    @property
    def num_bytes(self) -> int:
        """What one receiver gets."""
        return self._starts[-1]

    def step_bytes(self, grain_bytes: int) -> int:
        """By how much a cut may miss the position asked for: a row, or one element where rows are longer than the grain."""
        return max(_step(part, grain_bytes) * part.local.dtype.itemsize for part in self.parts)

    def between(self, start: int, stop: int, grain_bytes: int) -> Iterator[tuple[Part, Rect]]:
        """The rectangles from position `start` to `stop`, both moved back to the last place that may be cut."""
        for i in range(bisect_right(self._starts, start) - 1, len(self.parts)):
            if self._starts[i] >= stop:
                return
            part = self.parts[i]
            first, last = (_cut(part, at - self._starts[i], grain_bytes) for at in (start, stop))
            if first == 0 and last == part.rect.area:
                yield part, part.rect
            elif first < last:
                yield from ((part, rect) for rect in _run(part.rect, first, last))


def _step(part: Part, grain_bytes: int) -> int:
    """Elements between two places where a part may be cut."""
    return part.rect.cols if part.rect.cols * part.local.dtype.itemsize <= grain_bytes else 1


def _cut(part: Part, num_bytes: int, grain_bytes: int) -> int:
    """Elements of the part before a position in it, in whole steps."""
    element = min(max(num_bytes // part.local.dtype.itemsize, 0), part.rect.area)
    return element - element % _step(part, grain_bytes)


def _run(rect: Rect, first: int, last: int) -> Iterator[Rect]:
    """Elements [first, last) of a rectangle in row-major order: the rest of a row, whole rows, the start of a row."""
    while first < last:
        row, col = divmod(first, rect.cols)
        rows = (last - first) // rect.cols if col == 0 else 0
        cols = rect.cols if rows else min(rect.cols - col, last - first)
        yield Rect(rect.hf, rect.row + row, rect.col + col, max(rows, 1), cols)
        first += max(rows, 1) * cols


def groups_of(layout: Layout) -> tuple[Group, ...]:
    """The ranks of a layout by equal contents, in the order of their first rank; those that hold nothing are left out."""
    found: dict[tuple[Local, ...], list[int]] = {}
    # Replicas usually share one table. The address spares hashing it again; `known` keeps the table alive meanwhile.
    known: dict[int, tuple[tuple[Local, ...], list[int]]] = {}
    for rank in range(layout.ranks):
        held = layout.locals(rank)
        if id(held) not in known:
            known[id(held)] = held, found.setdefault(held, [])
        known[id(held)][1].append(rank)
    return tuple(Group(tuple(ranks), held) for held, ranks in found.items() if held)


def flows_between(sources: tuple[Group, ...], targets: tuple[Group, ...]) -> tuple[Flow, ...]:
    """All flows that fill the targets from the sources, in the order in which they are first met.

    Raises: GeometryError when the sources do not hold some element of the targets, or hold it in overlapping rectangles.
    """
    index = _index(sources)
    found: dict[tuple[tuple[int, ...], int], list[Part]] = {}
    for number, group in enumerate(targets):
        for local in group.locals:
            for piece in local.pieces:
                covered = 0
                for held in index.get(piece.rect.hf, ()):
                    rect = piece.rect if held.rect == piece.rect else piece.rect.intersect(held.rect)
                    if rect is not None:
                        covered += rect.area
                        found.setdefault((held.groups, number), []).append(Part(rect, held, local, piece))
                if covered != piece.rect.area:
                    where = f"{local.name} on rank {group.ranks[0]}"
                    message = f"no source holds all of {piece.rect.span}"
                    raise GeometryError(message, where=where, expected=piece.rect.area, got=covered)
    senders = {holders: tuple(sorted(rank for i in holders for rank in sources[i].ranks)) for holders, _ in found}
    return tuple(Flow(holders, senders[holders], targets[number].ranks, parts) for (holders, number), parts in found.items())


def _index(sources: tuple[Group, ...]) -> dict[str, tuple[Held, ...]]:
    """The distinct rectangles of every HF tensor and who has them. They may not overlap, or an element would come twice."""
    places: dict[str, dict[Rect, dict[int, tuple[str, Piece]]]] = {}
    for number, group in enumerate(sources):
        for local in group.locals:
            for piece in local.pieces:
                places.setdefault(piece.rect.hf, {}).setdefault(piece.rect, {}).setdefault(number, (local.name, piece))
    for rects in places.values():
        if len(rects) > 1:
            check_disjoint(rects)
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal tuples once, so that comparing them is quick
    found = {}
    for hf, rects in places.items():
        found[hf] = tuple(Held(rect, shared.setdefault(tuple(where), tuple(where)), where) for rect, where in rects.items())
    return found
