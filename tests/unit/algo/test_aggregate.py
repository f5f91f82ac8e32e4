"""Sums and means over masked tokens and over sequences."""

from __future__ import annotations

import math

import torch

from megatron_rpp.algo.aggregate import constant_length, masked_sum, seq_mean_token_mean, seq_mean_token_sum, token_mean

NAN = math.nan
# 1 2 3 | 4 | nothing, with NaN wherever the mask is 0
LOSS_T = torch.tensor([1.0, 2.0, 3.0, NAN, 4.0, NAN, NAN, NAN])
MASK_T = torch.tensor([True, True, True, False, True, False, False, False])
CU_LEN_S1 = torch.tensor([0, 4, 6, 8])


def test_four_ways_to_make_one_number() -> None:
    """Tokens: 10 / 4. Sequences' means 2 and 4, the empty one not counted: 3. Their sums 6 and 4: 5. Three rows of 4: 10 / 12."""
    assert masked_sum(LOSS_T, MASK_T).item() == 10.0
    assert token_mean(LOSS_T, MASK_T).item() == 2.5
    assert seq_mean_token_mean(LOSS_T, MASK_T, CU_LEN_S1).item() == 3.0
    assert seq_mean_token_sum(LOSS_T, MASK_T, CU_LEN_S1).item() == 5.0
    assert math.isclose(constant_length(LOSS_T, MASK_T, CU_LEN_S1, 4).item(), 10 / 12, rel_tol=1e-7)


def test_parts_divided_by_the_steps_tokens_add_up_and_parts_divided_by_their_own_do_not() -> None:
    """Microbatches 1 2 3 and 4: 6 / 4 + 4 / 4 = 2.5, while the mean of 2 and 4 is 3."""
    parts = [(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool)), (torch.tensor([4.0]), torch.ones(1, dtype=torch.bool))]
    assert sum(token_mean(*part, num_tokens=4).item() for part in parts) == 2.5
    assert sum(token_mean(*part).item() for part in parts) / 2 == 3.0


def test_nothing_masked_is_zero_and_not_nan() -> None:
    none_T = torch.zeros(8, dtype=torch.bool)
    assert token_mean(LOSS_T, none_T).item() == 0.0
    assert seq_mean_token_mean(LOSS_T, none_T, CU_LEN_S1).item() == 0.0
    assert seq_mean_token_sum(LOSS_T, none_T, CU_LEN_S1).item() == 0.0
    empty_T, no_offsets = torch.zeros(0), torch.tensor([0])
    assert constant_length(empty_T, empty_T.bool(), no_offsets, 4).item() == 0.0
    assert seq_mean_token_mean(empty_T, empty_T.bool(), no_offsets).item() == 0.0


def test_gradients_reach_masked_tokens_only() -> None:
    """seq_mean_token_mean: 1 / (2 sequences * length): 1/6 for the three tokens, 1/2 for the one."""
    loss_T = LOSS_T.clone().requires_grad_()
    seq_mean_token_mean(loss_T, MASK_T, CU_LEN_S1).backward()
    torch.testing.assert_close(loss_T.grad, torch.tensor([1 / 6, 1 / 6, 1 / 6, 0, 1 / 2, 0, 0, 0]))
