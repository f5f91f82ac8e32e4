"""Advantages of responses that lie on several ranks: the bits of one process that holds them all."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.algo.advantage import AdvantageStats, compute_advantages
from megatron_rpp.algo.credit_stats import summarise
from megatron_rpp.config.schema import NORMALISED, Algo
from megatron_rpp.stats.moments import whiten
from tests.dist.ranks import run_ranks
from tests.reference.cases import Row, algo_of, batch_of, draw, everyone, on_tokens

DRAWS = 2000
STATS = {"scope": "domain", "num_domains": 2}
Step = tuple[list[Row], Algo, dict[str, Any]]


def _step(seed: int) -> Step:
    """A batch, settings of an estimator, and how it is normalised."""
    rows, algo, rng = draw(seed), algo_of(seed), random.Random(seed)
    stats = {"rescale": algo.estimator in NORMALISED, "population": rng.choice(("token", "sample"))}
    return rows, algo, stats | (STATS if rng.random() < 0.5 else {"scope": "global"})


def _mine(rows: list[Row], seed: int, place: int, size: int) -> list[int]:
    """The responses of one rank of `size`, in any order; often none."""
    rng = random.Random(8 * seed + size)
    rank_of = [rng.randrange(size) for _ in rows]
    return [i for i in rng.sample(range(len(rows)), len(rows)) if rank_of[i] == place]


def _advantages(step: Step, mine: list[int], seed: int, **group: Any) -> tuple[list[list[float]], AdvantageStats]:
    rows, algo, stats = step
    batch = batch_of([rows[i] for i in mine])
    normaliser = partial(whiten, **group, **stats)
    adv_T, seen = compute_advantages(batch, algo, scores=everyone(rows, algo, seed), normaliser=normaliser)
    return on_tokens(adv_T, batch), seen


def _seen(stats: AdvantageStats) -> tuple[float, ...]:
    return stats.population_size, stats.return_mean, stats.return_std, stats.return_min, stats.return_max, stats.zero_variance_frac


Answer = tuple[list[list[float]], tuple[float, ...], list[float]]


def _answers(rank: int) -> dict[tuple[int, int], Answer]:
    """By draw and number of ranks: on all four, and half the draws on one of two groups of two. Each time another split."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    answers = {}
    for seed in range(DRAWS):
        step = _step(seed)
        for size, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
            if size == 4 or seed % 4 == rank // 2:
                got, seen = _advantages(step, _mine(step[0], seed, rank % size, size), seed, group=group, deadline_s=60)
                answers[seed, size] = got, _seen(seen), seen.share.tolist()
    return answers


def test_no_split_over_two_or_four_ranks_shows_in_a_bit() -> None:
    """2,000 draws, each with its own settings, over four ranks, and half of them over two."""
    of_rank = run_ranks(4, _answers, timeout_s=300)
    for seed in range(DRAWS):
        step = _step(seed)
        whole, expected = _advantages(step, [*range(len(step[0]))], seed, group=None)
        for size, first in ((4, 0), (2, 2 * (seed % 4)))[: 1 + (seed % 4 < 2)]:
            answers = [of_rank[first + place][seed, size] for place in range(size)]
            for place, (got, seen, _) in enumerate(answers):
                assert got == [whole[i] for i in _mine(step[0], seed, place, size)], (seed, size)
                assert seen == _seen(expected), (seed, size)
            shares = [torch.tensor(share, dtype=torch.float64) for _, _, share in answers]
            assert summarise(shares) == summarise([expected.share]), (seed, size)


def _one_rank_has_everything(rank: int) -> list[list[float]]:
    step = draw(5), algo_of(5, ("reinforce_pp_baseline",)), STATS
    return _advantages(step, [*range(len(step[0]))] if rank == 1 else [], 5, group=dist.group.WORLD, deadline_s=60)[0]


def test_empty_ranks_take_part() -> None:
    step = draw(5), algo_of(5, ("reinforce_pp_baseline",)), STATS
    alone, _ = _advantages(step, [*range(len(step[0]))], 5, group=None)
    assert run_ranks(2, _one_rank_has_everything) == [[], alone]
