"""A seed's tokens do not depend on who shares the batch.

SGLang's noise for token c of a request is a hash of (seed, position, c). As soon as one request of the batch is greedy, or has a
top-k or top-p, and for as long as that batch lives on, all its requests are sampled over sorted probabilities, with the noise of
the rank in place of the token's. Here what a filter leaves goes back to the order of the vocabulary first, and a row without a
filter is left as it was, to the bit: rounding in a cumulative sum must not take its last tokens away.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rpp_patches._record import Patch


def filtered(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """Probabilities with what top-k and top-p exclude at 0, in the order they came in. [n, v], [n], [n] -> [n, v]

    As SGLang's own: the first k of the sorted ones, and of those the ones before which less than p has been given away.
    """
    sorted_probs, token_of = probs.sort(dim=-1, descending=True, stable=True)
    before = sorted_probs.cumsum(dim=-1) - sorted_probs
    rank = torch.arange(probs.shape[-1], device=probs.device)
    is_left = (rank < top_ks.view(-1, 1)) & (before <= top_ps.view(-1, 1))
    is_whole = ((top_ks >= probs.shape[-1]) & (top_ps >= 1)).view(-1, 1)
    return torch.where(torch.zeros_like(is_left).scatter(-1, token_of, is_left) | is_whole, probs, 0)


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def top_k_top_p_min_p_sampling_from_probs_torch(
        probs: Tensor,
        top_ks: Tensor,
        top_ps: Tensor,
        min_ps: Tensor,
        need_min_p_sampling: bool,
        sampling_seed: Tensor | None,
        positions: Tensor,
        *,
        return_filtered_probs: bool = False,
    ) -> Any:
        if sampling_seed is None or need_min_p_sampling or return_filtered_probs:
            rest = (min_ps, need_min_p_sampling, sampling_seed, positions)
            return original(probs, top_ks, top_ps, *rest, return_filtered_probs=return_filtered_probs)
        sampler = importlib.import_module("sglang.srt.layers.sampler")
        return sampler.sampling_from_probs_torch(filtered(probs, top_ks, top_ps), sampling_seed=sampling_seed, positions=positions)

    return top_k_top_p_min_p_sampling_from_probs_torch


def _probe() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    got = filtered(probs.expand(3, 4), torch.tensor([1, 4, 4]), torch.tensor([1.0, 1.0, 0.5])) > 0
    assert got.tolist() == [[False, True, False, False], [True] * 4, [False, True, False, True]], got


PATCH = Patch(
    id="p110-noise-by-vocabulary",
    library="sglang",
    target="sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
    kind="wrap",
    why="a seeded request samples other tokens once a greedy request, or one with top-k or top-p, has been in its batch",
    upstream="https://github.com/sgl-project/sglang/pull/35697",
    versions=">=0.5.21,<0.5.22",
    remove_when="the filtered path of seeded sampling draws its noise by token, as in that pull request",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_a_greedy_neighbour_changes_a_seeds_tokens_without_the_patch",
    make=_make,
)
