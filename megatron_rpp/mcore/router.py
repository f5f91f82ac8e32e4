"""Choosing experts by groups as DeepSeek does, where Megatron's own rule differs. Pure tensor code; knows nothing of megatron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """Ranks a group of experts by the sum of its `best` best scores.

    Megatron takes the best top_k // groups_taken of each group, which is DeepSeek-V3's two at its published sizes and is never
    DeepSeek-V2's one unless a token takes as many groups as experts. It asks this object, in the place that it has for
    replayed routing, and computes weights from what it gets.
    """

    best: int

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None, default: Callable | None = None
    ) -> tuple[Tensor, Tensor]:
        """The scores and indices of the experts of each token, best first.

        Letters: E experts, K = topk, G groups. Shapes: scores [T, E] -> [T, K], [T, K] int64
        Source: DeepSeek-V2 (arXiv 2405.04434) section 2.2.2, best = 1; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, best = 2.
        """
        assert num_groups and group_topk, "only a router with groups asks"
        tokens, experts = scores.shape
        group_TG = scores.view(tokens, num_groups, -1).topk(self.best, dim=-1).values.sum(dim=-1)
        taken_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        taken_TG.scatter_(1, group_TG.topk(group_topk, dim=-1).indices, True)
        is_open_TE = taken_TG.repeat_interleave(experts // num_groups, dim=1)
        top = scores.masked_fill(~is_open_TE, float("-inf")).topk(topk, dim=1)
        return top.values, top.indices
