"""Which GPU should be which rank of an engine: the order in which most bytes need not leave the GPU that they are on.

The order is chosen before any module exists, from the settings alone, so that engines load while the policy is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_rpp.config.schema import Parallel
from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.layout import VOCAB_MULTIPLE, Layout, MegatronLayout, pad_vocab
from megatron_rpp.weights.rect import Local, Rect


@dataclass(frozen=True)
class Permuted:
    """A layout whose rank r lives on the GPU of rank devices[r], so that the planner sees it there.

    Raises: GeometryError when devices is no permutation of the layout's ranks.
    """

    layout: Layout
    devices: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.devices) != list(range(self.layout.ranks)):
            raise GeometryError("not a permutation", where="devices", expected=f"0..{self.layout.ranks - 1} in any order", got=self.devices)

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    def stage(self, rank: int) -> int:
        return self.layout.stage(self.devices.index(rank))

    def locals(self, rank: int) -> tuple[Local, ...]:
        return self.layout.locals(self.devices.index(rank))


def best_devices(src: Layout, dst: Layout, *, engine: tuple[int, ...]) -> tuple[int, ...]:
    """For each rank of an engine the training rank whose GPU it should run on: devices[i] for engine rank engine[i].

    Among all orders of the engine's own GPUs the one that maximises sum_i local_bytes(devices[i], engine[i]); of equally good
    ones one that moves as few ranks as possible, so the order stays as it is where both sides cut alike. The order goes into
    the engine's CUDA_VISIBLE_DEVICES.
    engine: ranks of `dst` that are one engine, by engine rank; they are ranks of `src` on the same GPUs.
    Source: that peers leave the order as it is costs 70B at tp 4, pp 2 -> tp 8 three quarters of its local bytes.
    """
    held = [_rects(src.locals(rank)) for rank in engine]
    size = len(engine)
    # One more than the number of ranks for each byte leaves room below for the wish to stay.
    gain = [[local_bytes(held[j], dst.locals(rank)) * (size + 1) + (i == j) for j in range(size)] for i, rank in enumerate(engine)]
    return tuple(engine[j] for j in assign(gain))


def kept_bytes(src: Layout, dst: Layout, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Of the bytes that some ranks get: those that they hold themselves, and all."""
    kept = sum(local_bytes(_rects(src.locals(rank)), dst.locals(rank)) for rank in ranks)
    return kept, sum(piece.rect.area * local.dtype.itemsize for rank in ranks for local in dst.locals(rank) for piece in local.pieces)


def planned_layout(model: Model, parallel: Parallel, dtype: torch.dtype) -> MegatronLayout:
    """The policy's layout by its settings: exact where layers divide evenly over stages, else with stages as equal as can be.

    For choosing an order, which is never wrong, only better or worse. Raises: GeometryError when heads or experts do not divide.
    """
    more = {"replicas": parallel.cp * parallel.dp, "ep": parallel.ep, "etp": parallel.etp}
    layers, stages = model.dims.layers, parallel.pp
    if layers % (stages * parallel.vpp) == 0:
        return MegatronLayout.even(model, pp=stages, vpp=parallel.vpp, tp=parallel.tp, dtype=dtype, **more)
    held = tuple(tuple(range(n * layers // stages, (n + 1) * layers // stages)) for n in range(stages))
    return MegatronLayout(model, parallel.tp, held, dtype, pad_vocab(model.dims.vocab, VOCAB_MULTIPLE * parallel.tp), **more)


def local_bytes(held: Mapping[str, tuple[Rect, ...]], wanted: tuple[Local, ...]) -> int:
    """Bytes of the wanted tensors that are among the held rectangles, in the receiver's dtype."""
    total = 0
    for local in wanted:
        for piece in local.pieces:
            common = (piece.rect.intersect(rect) for rect in held.get(piece.rect.hf, ()))
            total += sum(rect.area for rect in common if rect is not None) * local.dtype.itemsize
    return total


def _rects(locals_: tuple[Local, ...]) -> dict[str, tuple[Rect, ...]]:
    """The distinct rectangles of one rank by HF tensor; a tied head is its embedding again."""
    found: dict[str, dict[Rect, None]] = {}
    for local in locals_:
        for piece in local.pieces:
            found.setdefault(piece.rect.hf, {})[piece.rect] = None
    return {hf: tuple(rects) for hf, rects in found.items()}


def assign(gain: list[list[int]]) -> tuple[int, ...]:
    """The column for each row, each used once, whose gains add up to most. Exact, in integers, O(n^3).

    Source: shortest augmenting paths with potentials (Jonker and Volgenant 1987), on costs -gain.
    """
    size = len(gain)
    row_price, col_price = [0] * (size + 1), [0] * (size + 1)
    row_of = [size] * (size + 1)  # by column; row `size` is none, and column `size` stands for the row being placed
    for row in range(size):
        row_of[size], col = row, size
        reach: list[float] = [float("inf")] * size
        came_from, done = [size] * size, [False] * (size + 1)
        while row_of[col] != size:
            done[col], here = True, row_of[col]
            for other in range(size):
                cost = -gain[here][other] - row_price[here] - col_price[other]
                if not done[other] and cost < reach[other]:
                    reach[other], came_from[other] = cost, col
            col = min((other for other in range(size) if not done[other]), key=lambda other: reach[other])
            step = reach[col]
            for other in range(size + 1):
                if done[other]:
                    row_price[row_of[other]] += step
                    col_price[other] -= step
                elif other < size:
                    reach[other] -= step
        while col != size:
            row_of[col], col = row_of[came_from[col]], came_from[col]
    return tuple(row_of[:size].index(row) for row in range(size))
