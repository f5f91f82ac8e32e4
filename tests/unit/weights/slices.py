"""An engine's layout for the planner's tests: fused tensors over `tp` ranks, KV heads repeated where there are too few.

Ranks beyond the first engine hold copies, so one plan feeds several engines. Names and cuts are those of SGLang's dense models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.rect import Local, Piece, Rect


@dataclass(frozen=True)
class EngineSlices:
    model: Model
    tp: int
    ranks: int
    dtype: torch.dtype

    def stage(self, rank: int) -> int:
        return 0

    def locals(self, rank: int) -> tuple[Local, ...]:
        return self._table[rank % self.tp] if rank < self.ranks // self.tp * self.tp else ()

    @cached_property
    def _table(self) -> tuple[tuple[Local, ...], ...]:
        return tuple(self._rank(rank) for rank in range(self.tp))

    def _rank(self, rank: int) -> tuple[Local, ...]:
        dims, shapes, found = self.model.dims, self.model.hf_shapes, []
        query = dims.heads * dims.head // self.tp
        held = max(1, dims.kv_heads // self.tp) * dims.head
        key = rank // max(1, self.tp // dims.kv_heads) * held
        for hf, shape in shapes.items():
            stem, width = hf.rpartition("_proj.")[0], shape[1] if len(shape) == 2 else 1
            if ".q_proj." in hf:
                kind = hf.rpartition(".")[2]
                parts = [("q", rank * query, query), ("k", key, held), ("v", key, held)]
                parts = [(hf.replace(".q_proj.", f".{part}_proj."), row, rows) for part, row, rows in parts]
                found.append(self._fused(f"{stem.removesuffix('.q')}.qkv_proj.{kind}", parts, width, len(shape)))
            elif ".gate_proj." in hf:
                rows = dims.ffn // self.tp
                parts = [(hf, rank * rows, rows), (hf.replace(".gate_", ".up_"), rank * rows, rows)]
                found.append(self._fused(f"{stem.removesuffix('.gate')}.gate_up_proj.weight", parts, width, 2))
            elif hf.endswith(("o_proj.weight", "down_proj.weight")):
                cols = width // self.tp
                found.append(Local(hf, (shape[0], cols), self.dtype, (Piece(Rect(hf, 0, rank * cols, shape[0], cols)),)))
            elif hf in ("model.embed_tokens.weight", "lm_head.weight"):
                rows = -(-dims.vocab // (64 * self.tp)) * 64
                own = min(rows, dims.vocab - rank * rows)
                pieces = (Piece(Rect(hf, rank * rows, 0, own, width)),) if own > 0 else ()
                found.append(Local(hf, (rows, width), self.dtype, pieces))
            elif not hf.rpartition(".")[0].endswith(("k_proj", "v_proj", "up_proj")):
                found.append(Local(hf, shape, self.dtype, (Piece(Rect(hf, 0, 0, shape[0], 1)),)))
        return tuple(found)

    def _fused(self, name: str, parts: list[tuple[str, int, int]], width: int, ndim: int) -> Local:
        pieces, at = [], 0
        for hf, row, rows in parts:
            pieces.append(Piece(Rect(hf, row, 0, rows, width), at))
            at += rows
        return Local(name, (at, width) if ndim == 2 else (at,), self.dtype, tuple(pieces))
