"""Token rewards and discounted returns, against hand sums and the backward loop."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.returns import compute_returns, kl_penalties, kl_per_token, token_rewards
from tests.reference.batches import close, packed, rows_of
from tests.reference.estimators import returns
from tests.reference.properties import steady


def test_the_score_stands_on_the_last_masked_token() -> None:
    """Row 0 ends with a tool's answer: the score goes to token 2 and not to token 3. Row 1 has no token of the policy: none."""
    batch = packed([[0, 1, 1, 0], [0, 0], [0, 1]], [3.0, 5.0, -2.0])
    assert rows_of(token_rewards(batch, batch.score_S, 0.0), batch) == [[0.0, 0.0, 3.0, 0.0], [0.0, 0.0], [0.0, -2.0]]


def test_every_masked_token_pays_for_its_distance_to_the_reference() -> None:
    """beta 0.1: 0.1 * (-1 - -1.5) = 0.05 is taken from the first token, 0.1 * (-2 - -1) = -0.1 from the last: 1 + 0.1.
    The tool's token pays nothing."""
    batch = packed([[0, 1, 0, 1]], [1.0], old=[[0, -1, -9, -2]], ref=[[0, -1.5, -1, -1]])
    close(rows_of(token_rewards(batch, batch.score_S, 0.1), batch), [[0.0, -0.05, 0.0, 1.1]])


def test_a_tools_token_has_no_reward_even_where_its_log_probabilities_are_numbers() -> None:
    """The reference is far off on the tool's token, 8 nats; the response pays 0.1 * (0.5 - 1) = -0.05 and that is all."""
    batch = packed([[0, 1, 0, 1]], [1.0], old=[[0, -1, -9, -2]], ref=[[0, -1.5, -1, -1]], outside=-8.0)
    batch = replace(batch, logp_ref_T=torch.where(batch.mask_T, batch.logp_ref_T, 0.0))
    assert rows_of(kl_per_token(batch), batch) == [[0.0, 0.5, 0.0, -1.0]]
    close(kl_penalties(batch, 0.1).tolist(), [-0.05])


def test_the_divergence_in_the_reward_has_the_name_that_was_asked_for() -> None:
    """x = 1: k1 is 1, k2 1/2, k3 exp(-1)."""
    batch = packed([[1]], [0.0], old=[[1.0]], ref=[[0.0]])
    paid = [-token_rewards(batch, batch.score_S, 1.0, name).item() for name in ("k1", "k2", "k3")]
    close(paid, [1.0, 0.5, math.exp(-1)])


def test_a_penalty_without_a_reference_is_refused() -> None:
    batch = packed([[1]], [1.0], old=[[-1.0]])
    with pytest.raises(ValueError, match="logp_ref_T"):
        token_rewards(batch, batch.score_S, 0.1)


def test_a_discounted_return_by_hand() -> None:
    """gamma 0.5, rewards 1 2 4 in one row and 8 in the next: 4, 2 + 2 = 4, 1 + 2 = 3; the neighbour's 8 stays out."""
    mask_T = torch.ones(4, dtype=torch.bool)
    got = compute_returns(torch.tensor([1.0, 2.0, 4.0, 8.0]), mask_T, torch.tensor([0, 3, 4]), 0.5)
    assert got.tolist() == [3.0, 4.0, 4.0, 8.0]
    assert got.dtype == torch.float64


def test_a_tools_answer_neither_decays_nor_resets_the_return() -> None:
    """gamma 0.9 over masked tokens only: 1, 0.9, 0.81, 0.729, with two tool tokens in between (verl restarts, OpenRLHF decays there)."""
    batch = packed([[1, 1, 0, 0, 1, 1]], [1.0])
    reward_T = token_rewards(batch, batch.score_S, 0.0)
    close(rows_of(compute_returns(reward_T, batch.mask_T, batch.cu_len_S1, 0.9), batch), [[0.729, 0.81, 0.0, 0.0, 0.9, 1.0]])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129])
def test_returns_equal_the_backward_loop(length: int, gamma: float) -> None:
    dice = random.Random(length)
    masks = [[dice.random() < 0.8 for _ in range(length)] for _ in range(3)]
    old = [[dice.gauss(-1, 1) for _ in range(length)] for _ in range(3)]
    ref = [[dice.gauss(-1, 1) for _ in range(length)] for _ in range(3)]
    scores = [1.0, -1.0, 0.25]
    batch = packed(masks, scores, old=old, ref=ref)
    got = rows_of(compute_returns(token_rewards(batch, batch.score_S, 0.3), batch.mask_T, batch.cu_len_S1, gamma), batch)
    expected = [returns(list(zip(masks[i], old[i], ref[i], strict=True)), scores[i], beta=0.3, gamma=gamma) for i in range(3)]
    close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.999, 0.9, 1.0])
def test_thirty_two_thousand_tokens_keep_their_digits(gamma: float) -> None:
    """Against exact rational sums at a few places. Dividing by gamma^t, the short way to write this, would overflow at gamma 0.9."""
    length = 32768
    generator = torch.Generator().manual_seed(7)
    reward_T = torch.randn(length, generator=generator, dtype=torch.float64)
    got = compute_returns(reward_T, torch.ones(length, dtype=torch.bool), torch.tensor([0, length]), gamma)
    values = reward_T.tolist()
    for start in (0, 1, 20000, length - 1):
        exact = math.fsum(value * gamma**age for age, value in enumerate(values[start:]))
        scale = math.fsum(abs(value) * gamma**age for age, value in enumerate(values[start:]))
        assert abs(got[start].item() - exact) <= 1e-14 * scale


@steady
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
def test_a_response_has_the_same_bits_whatever_it_is_packed_with(masks: list[list[bool]], gamma: float, seed: int) -> None:
    dice = random.Random(seed)
    rewards = [[dice.gauss(0, 1) for _ in mask] for mask in masks]
    alone = []
    for mask, reward in zip(masks, rewards, strict=True):
        alone.append(compute_returns(torch.tensor(reward), torch.tensor(mask), torch.tensor([0, len(mask)]), gamma).tolist())
    batch = packed(masks, [0.0] * len(masks))
    together_T = compute_returns(torch.tensor([value for reward in rewards for value in reward]), batch.mask_T, batch.cu_len_S1, gamma)
    assert rows_of(together_T, batch) == alone


def test_an_empty_batch_has_empty_returns() -> None:
    batch = packed([], [])
    reward_T = token_rewards(batch, batch.score_S, 0.0)
    assert compute_returns(reward_T, batch.mask_T, batch.cu_len_S1, 0.9).tolist() == []


def test_nan_stored_outside_the_mask_is_not_read() -> None:
    mask_T = torch.tensor([False, True, False, True])
    reward_T = torch.tensor([math.nan, 1.0, math.inf, 2.0])
    assert compute_returns(reward_T, mask_T, torch.tensor([0, 4]), 1.0).tolist() == [0.0, 3.0, 0.0, 2.0]


def test_bfloat16_rewards_are_summed_in_float64() -> None:
    """1 + 2^-9 needs more bits than bfloat16's eight; the sum of the two parts does not lose it."""
    got = compute_returns(torch.tensor([2.0**-9, 1.0], dtype=torch.bfloat16), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]), 1.0)
    assert got.tolist() == [1.0 + 2.0**-9, 1.0]
