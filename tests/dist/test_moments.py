"""The normalisation over real gloo processes: the same bits for every split, empty ranks, and errors that nobody waits for."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.algo.advantage import compute_advantages
from megatron_rpp.algo.baselines import Scores
from megatron_rpp.config.schema import Algo
from megatron_rpp.errors import DeadlineError, NumericsError
from megatron_rpp.stats.moments import distributed_moments, whiten
from megatron_rpp.types import PackedBatch
from tests.dist.ranks import run_ranks
from tests.reference.batches import packed, rows_of

Row = dict[str, Any]
OPTIONS = [
    {"estimator": "reinforce_pp", "kl_reward_coef": 0.1, "gamma": 0.95, "norm_population": population} for population in ("token", "sample")
] + [{"estimator": "reinforce_pp_baseline", "norm_population": population} for population in ("token", "sample")]


def _rows(seed: int) -> list[Row]:
    """Twelve responses to four prompts, of very different length and size of value."""
    dice = random.Random(seed)
    rows = []
    for i in range(12):
        length = dice.choice([1, 2, 5, 40])
        columns = {name: [dice.gauss(-1, 1) * 10 ** dice.uniform(-6, 1) for _ in range(length)] for name in ("old", "ref")}
        rows.append({"mask": [dice.random() < 0.8 for _ in range(length)], "score": dice.gauss(0, 3), "group": i % 4, **columns})
    rows[0]["mask"][0] = True
    return rows


def _batch(rows: list[Row]) -> PackedBatch:
    def column(name: str) -> list[Any]:
        return [row[name] for row in rows]

    return packed(column("mask"), column("score"), groups=column("group"), old=column("old"), ref=column("ref"))


def _advantages(rank: int, rows: list[Row], shares: list[list[list[int]]]) -> list[list[list[list[float]]]]:
    """For each option and each way to share the rows: this rank's advantages by row."""
    everything = Scores(torch.tensor([row["score"] for row in rows], dtype=torch.float64), torch.tensor([row["group"] for row in rows]))
    normaliser = partial(whiten, group=dist.group.WORLD, deadline_s=30.0)
    answers = []
    for options in OPTIONS:
        for share in shares:
            batch = _batch([rows[i] for i in share[rank]])
            adv_T, _ = compute_advantages(batch, Algo(**options), scores=everything, normaliser=normaliser)
            answers.append(rows_of(adv_T, batch) if share[rank] else [])
    return answers


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_split_over_ranks_gives_the_same_bits(ranks: int) -> None:
    """Even, uneven, shuffled, with empty ranks and all on the last rank: bit for bit what one process gets."""
    rows = _rows(ranks)
    order = random.Random(0).sample(range(12), 12)
    shares = [
        [list(range(rank, 12, ranks)) for rank in range(ranks)],
        [order[12 * rank // ranks : 12 * (rank + 1) // ranks] for rank in range(ranks)],
        [order[:1], order[1:], *[[] for _ in range(ranks - 2)]],
        [[] for _ in range(ranks - 1)] + [list(range(12))],
    ]
    answers = run_ranks(ranks, _advantages, rows, shares, timeout_s=90)
    whole = Scores(_batch(rows).score_S, _batch(rows).group_S)
    for number, options in enumerate(OPTIONS):
        adv_T, _ = compute_advantages(_batch(rows), Algo(**options), scores=whole, normaliser=partial(whiten, group=None))
        expected = rows_of(adv_T, _batch(rows))
        for which, share in enumerate(shares):
            for rank in range(ranks):
                got = answers[rank][number * len(shares) + which]
                assert got == [expected[i] for i in share[rank]], (options, which, rank)


def _counted(rank: int) -> int:
    """How many collectives one normalisation makes."""
    calls = 0
    original = dist.all_gather

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    dist.all_gather = counting
    x_T = torch.arange(4, dtype=torch.float64) + rank
    for population in ("token", "sample"):
        whiten(x_T, torch.ones(4, dtype=torch.bool), sequence_T=torch.tensor([0, 0, 1, 1]), group=dist.group.WORLD, population=population)
    return calls


def test_a_normalisation_takes_two_collectives() -> None:
    assert run_ranks(2, _counted) == [4, 4]


def _moments_of(rank: int, values: list[list[float]]) -> tuple[int, float, float, float, float]:
    x_T: Tensor = torch.tensor(values[rank], dtype=torch.float64)
    seen = distributed_moments(x_T, torch.ones_like(x_T, dtype=torch.bool), dist.group.WORLD)
    return seen.n, seen.mean, seen.variance, seen.min, seen.max


def test_two_ranks_by_hand_with_one_of_them_empty() -> None:
    """2 and 4: mean 3, variance 1, known to the rank that has nothing too."""
    assert run_ranks(2, _moments_of, [[2.0, 4.0], []]) == [(2, 3.0, 1.0, 2.0, 4.0)] * 2


def _error_of(rank: int, values: list[list[float]]) -> str:
    x_T = torch.tensor(values[rank], dtype=torch.float64)
    sequence_T = torch.zeros(x_T.numel(), dtype=torch.int64)
    try:
        whiten(x_T, torch.ones_like(x_T, dtype=torch.bool), sequence_T=sequence_T, group=dist.group.WORLD, deadline_s=20)
    except NumericsError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("values", "message"),
    [([[], [], []], "no token to learn from"), ([[1.0], [float("nan"), 2.0], []], "1 of 2 on rank 1 of the group")],
)
def test_a_batch_that_cannot_be_used_raises_the_same_error_on_every_rank(values: list[list[float]], message: str) -> None:
    errors = run_ranks(3, _error_of, values)
    assert message in errors[0]
    assert errors == [errors[0]] * 3


def _absent(rank: int) -> str:
    every_T, sequence_T = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    normalise = partial(whiten, torch.arange(2.0), every_T, sequence_T=sequence_T, group=dist.group.WORLD)
    normalise()
    if rank == 1:
        time.sleep(4)
        return "left"
    start = time.monotonic()
    try:
        normalise(deadline_s=1)
    except DeadlineError as error:
        return f"{time.monotonic() - start < 3} {error}"
    return "no error"


def test_a_rank_that_never_normalises_is_an_error_within_the_deadline() -> None:
    said = run_ranks(2, _absent, timeout_s=30)[0]
    assert said.startswith("True wait 'normalise advantages: sizes'"), said
