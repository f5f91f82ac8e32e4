"""Layouts written down as tables, for plans that no model makes: holes, overlaps, any cut at all."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_rpp.weights.rect import Local, Piece, Rect, Shape


@dataclass(frozen=True)
class Table:
    """Row r of the table is what rank r holds."""

    table: tuple[tuple[Local, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.table)

    def stage(self, rank: int) -> int:
        return 0

    def locals(self, rank: int) -> tuple[Local, ...]:
        return self.table[rank]


def table(*rects: Rect) -> Table:
    """One rectangle a rank, in a tensor of its own."""
    return Table(tuple((Local("w", (r.rows, r.cols), torch.float32, (Piece(r),)),) for r in rects))


def random_partition(shapes: dict[str, Shape], dtypes: dict[str, torch.dtype], *, ranks: int, seed: int) -> Table:
    """Every tensor in blocks of random height and width, each block on one to three ranks, every rank with its own names."""
    rng = random.Random(seed)
    found: list[list[Local]] = [[] for _ in range(ranks)]
    for hf, (height, width) in shapes.items():
        for rect in blocks(rng, hf, height, width):
            for rank in rng.sample(range(ranks), rng.randint(1, min(3, ranks))):
                row, col = rng.randint(0, 2), rng.randint(0, 2)  # margins that belong to no HF tensor
                shape = (rect.rows + row + rng.randint(0, 1), rect.cols + col)
                name = f"{rank}: {rect.span}"
                found[rank].append(Local(name, shape, dtypes[hf], (Piece(rect, row, col),)))
    return Table(tuple(map(tuple, found)))


def blocks(rng: random.Random, hf: str, height: int, width: int) -> list[Rect]:
    """A partition: bands of rows, each cut in columns of its own."""
    found = []
    for top, bottom in spans(rng, height):
        found += [Rect(hf, top, left, bottom - top, right - left) for left, right in spans(rng, width)]
    return found


def spans(rng: random.Random, size: int) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(rng.randint(1, size) for _ in range(rng.randint(0, 3)))})
    return list(pairwise(edges))
