"""Both sides of a mixture of experts as large as DeepSeek-V3, for the planner: expert parallel training, expert parallel engines.

Shapes and names are close enough to count with; no real model is described here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_rpp.weights.rect import Local, Piece, Rect

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sizes:
    layers: int = 61
    experts: int = 256
    hidden: int = 7168
    ffn: int = 2048
    lora: int = 1536
    heads: int = 128
    head: int = 128
    vocab: int = 129280

    def dense(self, layer: int, tp: int, tp_rank: int) -> list[Local]:
        """A layer without its experts: attention by heads, the rest on every rank, the router's bias in float32."""
        share = self.heads * self.head // tp
        at = f"model.layers.{layer}."
        own = tp_rank * share
        return [
            whole(f"{at}self_attn.q_a_proj.weight", self.lora, self.hidden),
            tensor(f"{at}self_attn.q_b_proj.weight", Rect(f"{at}self_attn.q_b_proj.weight", own, 0, share, self.lora)),
            tensor(f"{at}self_attn.o_proj.weight", Rect(f"{at}self_attn.o_proj.weight", 0, own, self.hidden, share)),
            whole(f"{at}input_layernorm.weight", self.hidden, 1),
            whole(f"{at}mlp.gate.weight", self.experts, self.hidden),
            whole(f"{at}mlp.gate.e_score_correction_bias", self.experts, 1, FP32),
        ]

    def expert(self, layer: int, number: int, which: str) -> Rect:
        shape = (self.hidden, self.ffn) if which == "down" else (self.ffn, self.hidden)
        return Rect(f"model.layers.{layer}.mlp.experts.{number}.{which}_proj.weight", 0, 0, *shape)

    def vocab_shard(self, name: str, tp: int, tp_rank: int) -> Local:
        rows = self.vocab // tp
        return tensor(name, Rect(name, tp_rank * rows, 0, rows, self.hidden))


def tensor(name: str, rect: Rect, dtype: torch.dtype = BF16) -> Local:
    return Local(name, (rect.rows, rect.cols), dtype, (Piece(rect),))


def whole(name: str, rows: int, cols: int, dtype: torch.dtype = BF16) -> Local:
    return tensor(name, Rect(name, 0, 0, rows, cols), dtype)


@dataclass(frozen=True)
class Training:
    """rank = ep_rank + ep * stage, tp 1: every rank of a stage has its dense part, and its own experts."""

    sizes: Sizes
    pp: int
    ep: int

    @property
    def ranks(self) -> int:
        return self.pp * self.ep

    def stage(self, rank: int) -> int:
        return rank // self.ep

    def locals(self, rank: int) -> tuple[Local, ...]:
        return self._table[rank]

    @cached_property
    def _table(self) -> tuple[tuple[Local, ...], ...]:
        return tuple(tuple(self._rank(rank)) for rank in range(self.ranks))

    def _rank(self, rank: int) -> list[Local]:
        sizes, stage, each = self.sizes, self.stage(rank), self.sizes.experts // self.ep
        found = [sizes.vocab_shard("model.embed_tokens.weight", 1, 0)] if stage == 0 else []
        for layer in range(sizes.layers * stage // self.pp, sizes.layers * (stage + 1) // self.pp):
            found += sizes.dense(layer, 1, 0)
            for number in range(rank % self.ep * each, (rank % self.ep + 1) * each):
                gate, up, down = (sizes.expert(layer, number, which) for which in ("gate", "up", "down"))
                name = f"decoder.layers.{layer}.mlp.experts.linear_fc{{}}.weight{number}"
                pieces = (Piece(gate), Piece(up, sizes.ffn))
                found.append(Local(name.format(1), (2 * sizes.ffn, sizes.hidden), BF16, pieces))
                found.append(tensor(name.format(2), down))
        return found + ([sizes.vocab_shard("lm_head.weight", 1, 0)] if stage == self.pp - 1 else [])


@dataclass(frozen=True)
class Engines:
    """Engines of tp ranks, dense part over tp, experts over the same ranks, stacked in one tensor for each layer."""

    sizes: Sizes
    tp: int
    ranks: int

    def stage(self, rank: int) -> int:
        return 0

    def locals(self, rank: int) -> tuple[Local, ...]:
        return self._table[rank % self.tp]

    @cached_property
    def _table(self) -> tuple[tuple[Local, ...], ...]:
        return tuple(tuple(self._rank(rank)) for rank in range(self.tp))

    def _rank(self, rank: int) -> list[Local]:
        sizes, each = self.sizes, self.sizes.experts // self.tp
        found = [sizes.vocab_shard(name, self.tp, rank) for name in ("model.embed_tokens.weight", "lm_head.weight")]
        for layer in range(sizes.layers):
            found += sizes.dense(layer, self.tp, rank)
            w13, w2 = [], []
            for slot in range(each):
                gate, up, down = (sizes.expert(layer, rank * each + slot, which) for which in ("gate", "up", "down"))
                w13 += [Piece(gate, index=(slot,)), Piece(up, sizes.ffn, index=(slot,))]
                w2.append(Piece(down, index=(slot,)))
            at = f"model.layers.{layer}.mlp.experts."
            found.append(Local(f"{at}w13_weight", (each, 2 * sizes.ffn, sizes.hidden), BF16, tuple(w13)))
            found.append(Local(f"{at}w2_weight", (each, sizes.hidden, sizes.ffn), BF16, tuple(w2)))
        return found
