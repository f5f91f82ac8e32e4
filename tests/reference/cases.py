"""Small batches drawn from a seed, as rows of plain numbers and as what the package takes. Nothing here is a formula.

A batch has prompts with two to four responses each, in mixed order; masks with holes; scores that are often equal; now and then a
response without a token of the policy. Wherever the mask is 0 the packed batch stores NaN, so that reading one shows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from megatron_rpp.algo.baselines import Scores
from megatron_rpp.algo.returns import kl_penalties
from megatron_rpp.config.schema import Algo, EstimatorName, KlName
from megatron_rpp.types import PackedBatch


@dataclass(frozen=True)
class Row:
    """One response; old, ref and value hold a number for each place of the mask."""

    mask: tuple[bool, ...]
    score: float
    group: int
    old: tuple[float, ...] = ()
    ref: tuple[float, ...] = ()
    value: tuple[float, ...] = ()
    is_truncated: bool = False
    domain: int = 0

    @property
    def length(self) -> int:
        return sum(self.mask)


Rows = Sequence[Row]
ESTIMATOR_NAMES: tuple[EstimatorName, ...] = get_args(EstimatorName)


def draw(seed: int, *, groups: int = 3, tokens: int = 5, score: Callable[[random.Random], float] | None = None) -> list[Row]:
    """The rows of one batch; at least one has a token."""
    rng = random.Random(seed)
    score = score or (lambda rng: rng.choice((0.0, 1.0, 1.0, -0.5, 0.1, 12.0)))
    rows = []
    for group in range(rng.randint(1, groups)):
        same = score(rng) if rng.random() < 0.2 else None
        for _ in range(rng.randint(2, 4)):
            mask = tuple(rng.random() < 0.75 for _ in range(rng.randint(1, tokens)))
            old, ref, value = (tuple(rng.gauss(-1, 0.5) for _ in mask) for _ in range(3))
            rows.append(Row(mask, score(rng) if same is None else same, group, old, ref, value, rng.random() < 0.2, group % 2))
    rng.shuffle(rows)
    if not any(row.length for row in rows):
        rows[0] = replace(rows[0], mask=(True,) * len(rows[0].mask))
    return rows


def widened(rows: Rows, seed: int) -> list[Row]:
    """The same responses with up to two more places before, after and between their tokens that are in no mask."""
    rng = random.Random(seed)

    def widen(row: Row) -> Row:
        places: list[int | None] = []
        for place in range(len(row.mask)):
            places += [*[None] * rng.randint(0, 2), place]
        places += [None] * rng.randint(0, 2)
        mask = tuple(place is not None and row.mask[place] for place in places)
        parts = {
            name: tuple(math.nan if place is None else getattr(row, name)[place] for place in places) for name in ("old", "ref", "value")
        }
        return replace(row, mask=mask, **parts)

    return [widen(row) for row in rows]


def batch_of(rows: Rows, dtype: torch.dtype = torch.float64, *, outside: float | None = math.nan) -> PackedBatch:
    """outside: what is stored where the mask is 0; None leaves there what the rows say."""
    mask_T = torch.tensor([flag for row in rows for flag in row.mask], dtype=torch.bool)

    def flat(name: str) -> Tensor:
        value_T = torch.tensor([value for row in rows for value in getattr(row, name)], dtype=dtype)
        return value_T if outside is None else torch.where(mask_T, value_T, outside)

    return PackedBatch(
        tokens_T=torch.zeros(mask_T.numel(), dtype=torch.int64),
        cu_len_S1=torch.tensor([0, *(len(row.mask) for row in rows)], dtype=torch.int32).cumsum(0).int(),
        mask_T=mask_T,
        logp_rollout_T=torch.full(mask_T.shape, math.nan),
        score_S=torch.tensor([row.score for row in rows], dtype=torch.float64),
        group_S=torch.tensor([row.group for row in rows], dtype=torch.int64),
        domain_S=torch.tensor([row.domain for row in rows], dtype=torch.int64),
        version_S=torch.zeros(len(rows), dtype=torch.int64),
        is_truncated_S=torch.tensor([row.is_truncated for row in rows], dtype=torch.bool),
        logp_old_T=flat("old"),
        logp_ref_T=flat("ref"),
        value_T=flat("value"),
    )


def scores_of(rows: Rows, *, greedy: Sequence[float] | None = None, penalties: Sequence[float] | None = None) -> Scores:
    """Of all responses of a step. greedy: one for each prompt; penalties: one for each response."""
    return Scores(
        score_S=torch.tensor([row.score for row in rows], dtype=torch.float64),
        group_S=torch.tensor([row.group for row in rows], dtype=torch.int64),
        lengths_S=torch.tensor([row.length for row in rows], dtype=torch.int64),
        is_truncated_S=torch.tensor([row.is_truncated for row in rows], dtype=torch.bool),
        greedy_P=None if greedy is None else torch.tensor(list(greedy), dtype=torch.float64),
        penalty_S=None if penalties is None else torch.tensor(list(penalties), dtype=torch.float64),
    )


def algo_of(seed: int, names: Sequence[EstimatorName] = ESTIMATOR_NAMES, **fixed: object) -> Algo:
    """Settings of one of the named estimators."""
    rng = random.Random(seed + 1)
    drawn = {
        "estimator": rng.choice(names),
        "gamma": rng.choice((1.0, 1.0, 0.9, 0.0)),
        "kl_reward_coef": rng.choice((0.0, 0.1)),
        "kl_reward": rng.choice(get_args(KlName)),
        "reward_clip": rng.choice((None, (-10.0, 10.0))),
        "gae_lambda": rng.choice((1.0, 0.95, 0.0)),
        "gae_length_alpha": rng.choice((None, 0.4)),
        "grpo_std": rng.choice(("group", "batch")),
        "grpo_std_unbiased": rng.random() < 0.5,
        "grpo_std_eps": rng.choice((1e-6, 1e-4)),
    }
    return Algo(**(drawn | fixed))


def greedy_of(seed: int) -> list[float]:
    """One score for each prompt of `draw`."""
    rng = random.Random(seed + 2)
    return [rng.choice((0.0, 1.0, 0.3)) for _ in range(3)]


def everyone(rows: Rows, algo: Algo, seed: int) -> Scores:
    """What every rank knows of a step, greedy scores included, and penalties where the estimator asks for them."""
    penalties = None
    if algo.estimator == "rloo" and algo.kl_reward_coef != 0.0:
        penalties = kl_penalties(batch_of(rows), algo.kl_reward_coef, algo.kl_reward).tolist()
    return scores_of(rows, greedy=greedy_of(seed), penalties=penalties)


def on_tokens(value_T: Tensor, batch: PackedBatch) -> list[list[float]]:
    """What each row's masked tokens hold, in order; a value elsewhere that is not exactly 0 is an error."""
    values, flags = value_T.tolist(), batch.mask_T.tolist()
    assert not any(value for value, flag in zip(values, flags, strict=True) if not flag), "a value outside the mask"
    return [[values[t] for t in range(start, end) if flags[t]] for start, end in pairwise(batch.cu_len_S1.tolist())]
