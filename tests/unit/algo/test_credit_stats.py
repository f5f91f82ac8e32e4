"""The numbers that tell what a step's advantages look like, and that no split of the responses over ranks shows in them."""

from __future__ import annotations

import math
import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.credit_stats import NUM_SHARE, CreditSummary, credit_share, summarise
from tests.reference.cases import batch_of, draw
from tests.reference.credit import correlation
from tests.reference.properties import thorough


def _summary(rows: list[list[float]], parts: list[list[int]] | None = None) -> CreditSummary:
    """rows: the advantages of each response's tokens; parts: the responses of each rank."""
    shares = []
    for part in parts or [list(range(len(rows)))]:
        adv_T = torch.tensor([value for i in part for value in rows[i]], dtype=torch.float64)
        ends = [0, *accumulate(len(rows[i]) for i in part)]
        shares.append(credit_share(adv_T, torch.ones_like(adv_T, dtype=torch.bool), torch.tensor(ends, dtype=torch.int32)))
    return summarise(shares)


def test_a_mean_over_tokens_and_one_over_responses_by_hand() -> None:
    """A right answer of one token, 1.5 on it, and a wrong one of three, -.5 on each: by tokens 0, by responses 1/2. The longer has
    the smaller advantage, and two points lie on a line: correlation -1 (OpenRLHF#856 asks why the mean is not 0)."""
    seen = _summary([[1.5], [-0.5] * 3])
    assert (seen.token_mean, seen.sample_mean, seen.length_corr) == (0.0, 0.5, -1.0)
    assert (seen.min, seen.max, seen.abs_max, seen.is_degenerate) == (-0.5, 1.5, 1.5, False)


def test_a_batch_of_zeros_is_degenerate_and_correlates_with_nothing() -> None:
    seen = _summary([[0.0], [0.0, -0.0], [0.0]])
    assert seen == CreditSummary(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True)
    assert math.copysign(1, seen.min) == 1


def test_equal_advantages_that_do_not_add_up_exactly_correlate_with_nothing() -> None:
    """One number on every token of six lengths: what rounding leaves of the spread is not one."""
    assert _summary([[0.8280632784038988] * length for length in (11, 3, 7, 19, 8, 8)]).length_corr == 0.0


def test_no_rank_has_a_token() -> None:
    assert _summary([], [[], []]) == CreditSummary(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True)


def test_huge_advantages_that_cancel_do_not_hide_a_small_one() -> None:
    """1e30 - 1e30 + 1 over three ranks is 1, whichever rank comes first; added as floats it would be 0 in some orders."""
    rows = [[1e30], [1.0], [-1e30]]
    for parts in ([[0], [1], [2]], [[1], [0], [2]], [[2, 1], [], [0]]):
        assert _summary(rows, parts).token_mean == 1 / 3


def test_a_share_is_short() -> None:
    empty = batch_of([])
    assert credit_share(torch.zeros(0, dtype=torch.float64), empty.mask_T, empty.cu_len_S1).shape == (NUM_SHARE,)
    assert NUM_SHARE * 8 <= 160  # bytes


@thorough
@given(st.integers(0, 2**32 - 1))
def test_a_split_over_ranks_shows_in_no_bit_and_the_numbers_are_right(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 10.0 ** rng.randint(-3, 3)) for _ in range(row.length)] for row in draw(seed)]
    whole, full = _summary(rows), [row for row in rows if row]
    order = rng.sample(range(len(rows)), len(rows))
    cuts = sorted(rng.randint(0, len(rows)) for _ in range(3))
    assert _summary(rows, [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]) == whole
    values = [value for row in full for value in row]
    assert whole.token_mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12, abs=1e-12)
    means = [math.fsum(row) / len(row) for row in full]
    assert whole.sample_mean == pytest.approx(math.fsum(means) / len(means), rel=1e-12, abs=1e-12)
    assert whole.length_corr == pytest.approx(correlation([(len(row), mean) for row, mean in zip(full, means, strict=True)]), abs=1e-9)
    assert (whole.min, whole.max) == (min(map(min, full)), max(map(max, full)))
