"""Layouts in block FP8: the same plan moves half the bytes, and an engine in FP8 gets the bits that quantising whole tensors gives.

An HF tensor is quantised where it lies when every rank of the source holds whole blocks of it; its FP8 form then travels with
its scales under names of their own, `X@fp8` and `X_scale_inv`. Any other is sent as it is and quantised by the rank that
receives it. What is quantised at all, quantise.is_quantised says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.buckets import Transfer
from megatron_rpp.weights.layout import Layout
from megatron_rpp.weights.quantise import BLOCK, DTYPE, SCALE_ENDING, Scales, is_aligned, is_quantised, quantise, scale_rect, scale_shape
from megatron_rpp.weights.rect import Local, Piece, Shape, as_matrix, view

FP8_ENDING = "@fp8"  # of an HF tensor, and of a source's local, in its FP8 form
WIDE_ENDING = "@wide"  # of a target's local that its own rank quantises

HfShapes = tuple[tuple[str, Shape], ...]


def quantised_at_source(source: Layout, shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The HF tensors that every rank of a layout holds in whole blocks."""
    found = {name for name in shapes if is_quantised(name)}
    for rank in range(source.ranks):
        for local in source.locals(rank):
            found -= {
                piece.rect.hf for piece in local.pieces if piece.rect.hf in found and not is_aligned(piece.rect, shapes[piece.rect.hf])
            }
    return frozenset(found)


@dataclass(frozen=True)
class Fp8Source:
    """A training layout that also offers the tensors in `chosen` in FP8, with their scales."""

    inner: Layout
    chosen: frozenset[str]

    @property
    def ranks(self) -> int:
        return self.inner.ranks

    def stage(self, rank: int) -> int:
        return self.inner.stage(rank)

    def locals(self, rank: int) -> tuple[Local, ...]:
        return tuple(offered for local in self.inner.locals(rank) for offered in self._offered(local))

    def _offered(self, local: Local) -> Iterator[Local]:
        yield local  # as it is too: a fused parameter of the engine may have a part that is quantised only there
        taken = [piece for piece in local.pieces if piece.rect.hf in self.chosen]
        if taken:
            yield Local(local.name + FP8_ENDING, local.shape, DTYPE, tuple(map(_in_fp8, taken)))
            rows, pieces, cols = 0, [], 1
            for piece in taken:  # one below the other, wherever they lie in the local itself
                rect = scale_rect(piece.rect)
                pieces.append(Piece(rect, rows))
                rows, cols = rows + rect.rows, max(cols, rect.cols)
            yield Local(local.name + SCALE_ENDING, (rows, cols), torch.float32, tuple(pieces))


class Fp8Tensors(Mapping[str, Tensor]):
    """The tensors of one rank of an Fp8Source, for one pass: what is asked for in FP8 is made then, and kept until another
    parameter is asked for, whatever becomes of the weights meanwhile."""

    def __init__(self, layout: Fp8Source, rank: int, tensors: Mapping[str, Tensor], *, scales: Scales = "float32") -> None:
        self._tensors, self._scales = tensors, scales
        self._locals = {local.name: local for local in layout.locals(rank)}
        self._plain = {local.name: local for local in layout.inner.locals(rank)}
        self._chosen = layout.chosen
        self._made: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        parameter = name.removesuffix(FP8_ENDING).removesuffix(SCALE_ENDING)
        if self._made[0] != parameter:
            self._made = (parameter, self._quantise(parameter))
        return self._made[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._locals)

    def __len__(self) -> int:
        return len(self._locals)

    def _quantise(self, parameter: str) -> dict[str, Tensor]:
        source, device = self._tensors[parameter], self._tensors[parameter].device
        names = (parameter + FP8_ENDING, parameter + SCALE_ENDING)
        made = {name: torch.empty(self._locals[name].shape, dtype=self._locals[name].dtype, device=device) for name in names}
        pieces = [piece for piece in self._plain[parameter].pieces if piece.rect.hf in self._chosen]
        for piece, scale_piece in zip(pieces, self._locals[names[1]].pieces, strict=True):
            weight, scale = quantise(view(source, piece, piece.rect), scales=self._scales, name=piece.rect.span)
            view(made[names[0]], piece, piece.rect).copy_(weight)
            view(made[names[1]], scale_piece, scale_piece.rect).copy_(scale)
        return made


@dataclass(frozen=True)
class Fp8Target:
    """An engine's layout whose matrices are in FP8: `X` in E4M3 and `X_scale_inv`, or `X@wide`, which Narrowing makes the two of.

    chosen: what the source quantises. hf_shapes: of the model. Raises: GeometryError where the engine's cut leaves the grid.
    """

    inner: Layout
    chosen: frozenset[str]
    hf_shapes: HfShapes

    @property
    def ranks(self) -> int:
        return self.inner.ranks

    def stage(self, rank: int) -> int:
        return self.inner.stage(rank)

    def locals(self, rank: int) -> tuple[Local, ...]:
        return tuple(wanted for local in self.inner.locals(rank) for wanted in self._wanted(local))

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return dict(self.hf_shapes)

    def _wanted(self, local: Local) -> Iterator[Local]:
        if not all(is_quantised(piece.rect.hf) for piece in local.pieces):
            yield local
            return
        scales = self.scales_of(local)
        if all(piece.rect.hf in self.chosen for piece in local.pieces):
            yield replace(local, dtype=DTYPE, pieces=tuple(map(_in_fp8, local.pieces)))
            yield scales
        else:
            yield replace(local, name=local.name + WIDE_ENDING)

    def scales_of(self, local: Local) -> Local:
        """The scales of one parameter, laid out as the parameter is, a block for 128 x 128 elements."""
        for piece in local.pieces:
            if piece.row % BLOCK or piece.col % BLOCK or not is_aligned(piece.rect, self._shapes[piece.rect.hf]):
                raise GeometryError(
                    "the engine cuts this parameter inside a block of 128 x 128",
                    where=local.name,
                    expected="starts and ends that are multiples of 128",
                    got=f"{piece.rect.span} at [{piece.row}, {piece.col}]",
                    fix="choose a smaller rollout.tp, or ep for experts",
                )
        *index, rows, cols = (*local.shape[:-2], *as_matrix(local.shape[-2:]))
        pieces = tuple(map(scale_piece, local.pieces))
        return Local(local.name + SCALE_ENDING, (*index, *scale_shape((rows, cols))), torch.float32, pieces)


@dataclass(frozen=True)
class Fp8Pair:
    """A training layout and an engine's in FP8, which agree on what travels in FP8."""

    source: Fp8Source
    target: Fp8Target

    @classmethod
    def of(cls, source: Layout, target: Layout, shapes: Mapping[str, Shape]) -> Fp8Pair:
        """shapes: of the model's HF tensors. Raises: GeometryError where the engine cuts a parameter inside a block."""
        chosen = quantised_at_source(source, shapes)
        return cls(Fp8Source(source, chosen), Fp8Target(target, chosen, tuple(shapes.items())))


class Narrowing:
    """Makes FP8 of what arrives at a rank of `target` under `X@wide`: every piece as soon as it is whole, so that the grid is that
    of the HF tensors and only pieces that are still arriving are held. For one pass."""

    def __init__(self, target: Fp8Target, *, scales: Scales = "float32") -> None:
        self._target, self._scales = target, scales
        self._begun: dict[tuple[str, Piece], tuple[Tensor, int]] = {}  # a piece's elements, and how many are still to come

    def take(self, parts: Iterable[tuple[Transfer, Tensor]]) -> list[tuple[Transfer, Tensor]]:
        """The parts as the engine wants them: `X` in E4M3 and `X_scale_inv` in place of `X@wide`, once its piece is whole.

        Raises: NumericsError for an element that is not finite.
        """
        found: list[tuple[Transfer, Tensor]] = []
        for transfer, values in parts:
            if not transfer.dst_local.endswith(WIDE_ENDING):
                found.append((transfer, values))
            elif (whole := self._whole(transfer, values)) is not None:
                found += self._in_fp8(transfer, whole)
        return found

    def _whole(self, transfer: Transfer, values: Tensor) -> Tensor | None:
        """The piece that a transfer belongs to, if it is the last of it."""
        piece, rect = transfer.dst_piece, transfer.rect
        if rect == piece.rect:
            return values
        key = (transfer.dst_local, piece)
        held, left = self._begun.pop(key, (None, piece.rect.area))
        if held is None:
            held = values.new_empty(piece.rect.rows, piece.rect.cols)
        view(held, Piece(piece.rect), rect).copy_(values)
        if left == rect.area:
            return held
        self._begun[key] = (held, left - rect.area)
        return None

    def _in_fp8(self, transfer: Transfer, whole: Tensor) -> Iterator[tuple[Transfer, Tensor]]:
        piece, name = transfer.dst_piece, transfer.dst_local.removesuffix(WIDE_ENDING)
        values, inverse = quantise(whole, scales=self._scales, name=piece.rect.span)
        yield replace(transfer, rect=piece.rect, dst_local=name, dtype=DTYPE), values
        of_scales = scale_piece(piece)
        yield replace(transfer, rect=of_scales.rect, dst_local=name + SCALE_ENDING, dst_piece=of_scales, dtype=torch.float32), inverse


def scale_piece(piece: Piece) -> Piece:
    """Where the scales of a piece lie among those of its parameter, a block for 128 x 128 elements."""
    return Piece(scale_rect(piece.rect), piece.row // BLOCK, piece.col // BLOCK, piece.index)


def final_locals(target: Fp8Target, rank: int) -> Sequence[Local]:
    """The engine's parameters as they are in the end, whoever quantised them: names, shapes, dtypes, and where each part lies."""
    found: list[Local] = []
    for local in target.inner.locals(rank):
        if all(is_quantised(piece.rect.hf) for piece in local.pieces):
            found += [replace(local, dtype=DTYPE), target.scales_of(local)]
        else:
            found.append(local)
    return found


def _in_fp8(piece: Piece) -> Piece:
    return replace(piece, rect=replace(piece.rect, hf=piece.rect.hf + FP8_ENDING))
