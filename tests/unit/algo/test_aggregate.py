"""Four ways from per-token losses to one number, each as a sum and a denominator that add up."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.aggregate import AGGREGATES, aggregate, masked_sum
from megatron_rpp.config.schema import AggregateName
from tests.reference.losses import aggregated
from tests.reference.properties import thorough

NAN = math.nan
# 1 2 3 | 4 | nothing, with NaN wherever the mask is 0
LOSS_T = torch.tensor([1.0, 2.0, 3.0, NAN, 4.0, NAN, NAN, NAN])
MASK_T = torch.tensor([True, True, True, False, True, False, False, False])
CU_LEN_S1 = torch.tensor([0, 4, 6, 8], dtype=torch.int32)


def test_every_name_has_its_function() -> None:
    assert set(AGGREGATES) == set(get_args(AggregateName))


@pytest.mark.parametrize(
    ("name", "total", "denominator"),
    [
        ("token_mean", 10.0, 4),
        ("seq_mean_token_mean", 2.0 + 4.0, 2),  # the empty response is not counted
        ("seq_mean_token_sum", 6.0 + 4.0, 2),
        ("constant_length", 10.0 / 4, 3),  # here it is; verl does not divide by the responses at all: 2.5 for 0.8333
    ],
)
def test_by_hand(name: AggregateName, total: float, denominator: int) -> None:
    loss, count = aggregate(LOSS_T, MASK_T, CU_LEN_S1, name, 4)
    assert (loss.item(), count.item(), count.dtype) == (total, denominator, torch.int64)
    assert masked_sum(LOSS_T, MASK_T).item() == 10.0


@thorough
@given(st.integers(0, 2**32 - 1), st.sampled_from(get_args(AggregateName)), st.integers(0, 5))
def test_parts_add_up_to_the_definition(seed: int, name: AggregateName, cut: int) -> None:
    """Responses of losses, None outside the mask, cut into two microbatches anywhere, one of them perhaps empty."""
    rng = random.Random(seed)
    rows = [[rng.choice((None, *range(1, 9))) for _ in range(rng.randrange(5))] for _ in range(rng.randrange(1, 6))]
    expected = aggregated([[float(value) for value in row if value is not None] for row in rows], name, 3)
    total, denominator = 0.0, 0
    for a, b in pairwise((0, min(cut, len(rows)), len(rows))):
        values = [NAN if value is None else float(value) for row in rows[a:b] for value in row]
        loss_T = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        cu_len_S1 = torch.tensor([0, *[len(row) for row in rows[a:b]]]).cumsum(0)
        loss, count = aggregate(loss_T, ~loss_T.isnan(), cu_len_S1, name, 3)
        loss.backward()
        assert torch.equal(loss_T.grad == 0, loss_T.isnan())
        total, denominator = total + loss.item(), denominator + count.item()
    assert total / max(denominator, 1) == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", get_args(AggregateName))
def test_nothing_masked_is_zero_and_not_nan(name: AggregateName) -> None:
    """An empty response, and a rank without a response; every length that divides is at least 1."""
    for loss_T, mask_T, cu_len_S1 in (
        (LOSS_T, torch.zeros(8).bool(), CU_LEN_S1),
        (torch.zeros(0), torch.zeros(0).bool(), torch.tensor([0])),
    ):
        leaf_T = loss_T.clone().requires_grad_()
        loss, count = aggregate(leaf_T, mask_T, cu_len_S1, name, 4)
        loss.backward()
        assert loss.item() == 0.0
        assert count.item() == (cu_len_S1.numel() - 1 if name == "constant_length" else 0)
        assert torch.equal(leaf_T.grad, torch.zeros_like(leaf_T))


def test_gradients_reach_masked_tokens_by_their_share() -> None:
    """seq_mean_token_mean: 1 / length, still to be divided by the 2 responses: 1/3 for the three tokens, 1 for the one."""
    loss_T = LOSS_T.clone().requires_grad_()
    aggregate(loss_T, MASK_T, CU_LEN_S1, "seq_mean_token_mean")[0].backward()
    torch.testing.assert_close(loss_T.grad, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 1, 0, 0, 0]))


def test_a_constant_length_must_be_given() -> None:
    """verl takes the padded width of the batch, which varies."""
    with pytest.raises(ValueError, match="aggregate_tokens"):
        aggregate(LOSS_T, MASK_T, CU_LEN_S1, "constant_length")
