"""Responses drawn from a seed, as the loops of tests/reference want them and as the packed tensors that the package takes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rpp.types import PackedBatch
from tests.reference.batches import packed
from tests.reference.losses import Response, Token

Microbatch = tuple[Tensor, Tensor, PackedBatch, Tensor]  # what an objective is called with


def draw(seed: int, lengths: Sequence[int], *, masked: float = 0.7, spread: float = 0.4, has_one_adv: bool = False) -> list[Response]:
    """One response for each length, with holes in its mask. spread: of each log-probability around the old one.

    has_one_adv: all tokens of a response have the same advantage, as where there is neither a discount nor KL in the reward.
    """
    rng = random.Random(seed)
    responses = []
    for length in lengths:
        adv, response = rng.gauss(0, 1), []
        for _ in range(length):
            old = -3 * rng.random()
            new, ref, rollout = (old + rng.gauss(0, spread) for _ in range(3))
            own = adv if has_one_adv else rng.gauss(0, 1)
            response.append(Token(rng.random() < masked, new, old, ref, rollout, rng.random(), own, rng.choice((0.0, 0.5, 1.0, 1.7))))
        responses.append(response)
    return responses


def flat(responses: Sequence[Response], value: Callable[[Token], float], dtype: torch.dtype = torch.float64) -> Tensor:
    """One number of every token, NaN where the mask is 0, so that reading one shows."""
    return torch.tensor([value(token) if token.is_masked else math.nan for response in responses for token in response], dtype=dtype)


def microbatch(responses: Sequence[Response], dtype: torch.dtype = torch.float64) -> Microbatch:
    """(logp_new_T with a gradient, entropy_T, batch, adv_T)."""
    batch = packed([[token.is_masked for token in response] for response in responses], [0.0] * len(responses), dtype=dtype)
    batch = replace(
        batch,
        logp_old_T=flat(responses, lambda token: token.old, dtype),
        logp_ref_T=flat(responses, lambda token: token.ref, dtype),
        logp_rollout_T=flat(responses, lambda token: token.rollout, dtype),
        weight_T=flat(responses, lambda token: token.weight, dtype),
    )
    new_T = flat(responses, lambda token: token.new, dtype).requires_grad_()
    return new_T, flat(responses, lambda token: token.entropy, dtype), batch, flat(responses, lambda token: token.adv)
