"""Advantages of responses that lie on several ranks: the bits of one process that holds them all."""

from __future__ import annotations

import random
from functools import partial

import torch
import torch.distributed as dist

from megatron_rpp.algo.advantage import NORMALISED, AdvantageStats, Normaliser, compute_advantages
from megatron_rpp.algo.credit_stats import CreditSummary, summarise
from megatron_rpp.config.schema import Algo
from megatron_rpp.dist.collectives import all_gather
from megatron_rpp.stats.moments import whiten
from tests.dist.ranks import run_ranks
from tests.reference.cases import CASES, Row, algo_of, batch_of, draw_many, everyone, on_tokens

CALLS = 2000 // CASES


def _advantages(
    rows: list[Row], mine: list[int], algo: Algo, seed: int, normaliser: Normaliser
) -> tuple[list[list[float]], AdvantageStats]:
    batch = batch_of([rows[i] for i in mine])
    adv_T, stats = compute_advantages(batch, algo, scores=everyone(rows, algo, seed), normaliser=normaliser)
    return on_tokens(adv_T, batch), stats


def _seen(stats: AdvantageStats, shares: list[torch.Tensor]) -> tuple[float | CreditSummary, ...]:
    return stats.population_size, stats.return_mean, stats.return_std, stats.zero_variance_frac, summarise(shares)


def _compare(rank: int) -> int:
    """On two groups of two ranks and on one of four, each seed with another split; how many calls agreed to the bit."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    agreed = 0
    for seed in range(CALLS):
        rows, algo, rng = draw_many(seed), algo_of(seed), random.Random(seed)
        stats = {"rescale": algo.estimator in NORMALISED, "population": rng.choice(("token", "sample"))}
        # By domain each case is a batch of its own; globally they all are one.
        stats |= {"scope": "domain", "num_domains": CASES} if seed % 4 else {"scope": "global"}
        whole, expected = _advantages(rows, [*range(len(rows))], algo, seed, partial(whiten, group=None, **stats))
        for size, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
            part_of = [rng.randrange(size) if rng.random() < 0.9 else 0 for _ in rows]
            mine = [i for i in rng.sample(range(len(rows)), len(rows)) if part_of[i] == rank % size]
            got, seen = _advantages(rows, mine, algo, seed, partial(whiten, group=group, deadline_s=60, **stats))
            assert got == [whole[i] for i in mine], (seed, size)
            assert _seen(seen, all_gather(seen.share, group)) == _seen(expected, [expected.share]), (seed, size)
            agreed += 1
    return agreed


def _one_rank_has_everything(rank: int) -> list[list[float]]:
    rows, algo = draw_many(5), algo_of(5, ("reinforce_pp_baseline",))
    mine = [*range(len(rows))] if rank == 1 else []
    return _advantages(rows, mine, algo, 5, partial(whiten, group=dist.group.WORLD, deadline_s=60))[0]


def test_no_split_over_two_or_four_ranks_shows_in_a_bit() -> None:
    assert run_ranks(4, _compare, timeout_s=300) == [2 * CALLS] * 4


def test_empty_ranks_take_part() -> None:
    rows, algo = draw_many(5), algo_of(5, ("reinforce_pp_baseline",))
    alone, _ = _advantages(rows, [*range(len(rows))], algo, 5, partial(whiten, group=None))
    assert run_ranks(2, _one_rank_has_everything) == [[], alone]
