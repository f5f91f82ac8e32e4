"""Generalised advantage estimation: goldens by hand, its two ends, holes in the mask, lambda by length."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.estimators import ESTIMATORS
from megatron_rpp.algo.gae import critic_returns, gae, length_lambda
from megatron_rpp.algo.returns import compute_returns
from megatron_rpp.config.schema import Algo
from tests.reference import credit as loops
from tests.reference.batches import close
from tests.reference.cases import Row, algo_of, batch_of, draw, on_tokens, scores_of
from tests.reference.properties import thorough

ONES3 = torch.ones(3, dtype=torch.bool)
CU3 = torch.tensor([0, 3])


def test_gae_by_hand() -> None:
    """Reward 1 on the last of three, values .5 .6 .7, gamma 1, lambda .95: delta .1 .1 .3, so .3; .1 + .95 * .3 = .385;
    .1 + .95 * .385 = .46575. Returns are these plus the values."""
    adv_T, return_T = gae(
        torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64), ONES3, CU3, gamma=1.0, lam=0.95
    )
    close(adv_T.tolist(), [0.46575, 0.385, 0.3])
    close(return_T.tolist(), [0.96575, 0.985, 1.0])
    assert adv_T.dtype == torch.float64


def test_a_tools_answer_neither_decays_nor_brings_in_its_value() -> None:
    """Two written tokens, two of a tool, two written; gamma .99, lambda .95. OpenRLHF decays through the hole: .3253671511."""
    mask_T = torch.tensor([True, True, False, False, True, True])
    value_T = torch.tensor([0.5, 0.6, math.nan, 9.0, 0.7, 0.8], dtype=torch.float64)
    reward_T = torch.tensor([0, 0, math.inf, 0, 0, 1.0], dtype=torch.float64)
    adv_T, return_T = gae(reward_T, value_T, mask_T, torch.tensor([0, 6]), gamma=0.99, lam=0.95)
    close(adv_T.tolist(), [0.429226224, 0.35643405, 0.0, 0.0, 0.2801, 0.2], rtol=1e-8)
    close(return_T.tolist(), [0.929226224, 0.95643405, 0.0, 0.0, 0.9801, 1.0], rtol=1e-8)


def test_the_next_sequence_does_not_look_over() -> None:
    """Two responses end to end: the value after the first one's last token is 0 and not the neighbour's."""
    adv_T, _ = gae(
        torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.5]), torch.ones(2, dtype=torch.bool), torch.tensor([0, 1, 2]), gamma=1.0, lam=1.0
    )
    assert adv_T.tolist() == [0.75, 1.5]


def test_lambda_by_length_by_hand() -> None:
    """alpha 1/2: of 2 tokens 1 - 1/1 = 0, of 4 tokens 1 - 1/2, of 1 token 1 - 2 < 0, hence 0; of none 0. VAPO's alpha of .05 needs 20."""
    assert length_lambda(torch.tensor([2, 4, 1, 0]), 0.5).tolist() == [0.0, 0.5, 0.0, 0.0]
    close(length_lambda(torch.tensor([20, 100]), 0.05).tolist(), [0.0, 0.8])


def test_lambda_by_length_counts_the_tokens_that_the_policy_wrote() -> None:
    """Two written tokens of four places: lambda 0, so the advantages are the two deltas: .5 - .5 and 1 - .5."""
    row = Row((True, False, True, False), 1.0, 0, (0.0,) * 4, (0.0,) * 4, (0.5,) * 4)
    algo = Algo(estimator="gae", gae_length_alpha=0.5)
    batch = batch_of([row])
    assert on_tokens(ESTIMATORS["gae"](batch, algo, scores_of([row])), batch) == [[0.0, 0.5]]
    # The critic looks all the way ahead: lambda 1, the score itself.
    assert on_tokens(critic_returns(batch, algo), batch) == [[1.0, 1.0]]


VALUES = (0.5, 0.6, 0.7)


@pytest.mark.parametrize(
    ("lam", "targets"),
    [
        (1.0, [1.0, 1.0, 1.0]),  # the score alone
        (0.5, [0.725, 0.85, 1.0]),  # .1 + .5 * .25 + .5; .1 + .5 * .3 + .6; .3 + .7
        (0.0, [0.6, 0.7, 1.0]),  # the next value, and the score at the end
        (None, [0.96575, 0.985, 1.0]),  # as the policy
    ],
)
def test_the_critics_own_lambda_by_hand(lam: float | None, targets: list[float]) -> None:
    """Score 1 on the last of three, values .5 .6 .7, gamma 1, the policy's lambda .95: delta .1 .1 .3."""
    row = Row((True,) * 3, 1.0, 0, (0.0,) * 3, (0.0,) * 3, VALUES)
    batch, algo = batch_of([row]), Algo(estimator="gae", gae_lambda=0.95)
    close(on_tokens(critic_returns(batch, algo, lam), batch), [targets])
    close(on_tokens(ESTIMATORS["gae"](batch, algo, scores_of([row])), batch), [[0.46575, 0.385, 0.3]])  # the policy's stay


@thorough
@given(st.integers(0, 2**32 - 1), st.sampled_from((None, 0.0, 0.5, 0.95, 1.0)))
def test_the_critics_targets_are_those_of_the_loops_wherever_the_responses_lie(seed: int, lam: float | None) -> None:
    """Packed all together, and each half by itself: the same bits."""
    rows, algo = draw(seed), algo_of(seed, ("gae",))
    batch = batch_of(rows)
    whole = on_tokens(critic_returns(batch, algo, lam), batch)
    expected = loops.critic_targets(rows, algo, lam)
    assert [len(row) for row in whole] == [len(row) for row in expected]
    for got, target in zip(whole, expected, strict=True):
        close(got, target, rtol=1e-10, atol=1e-10)
    parts = [batch_of(rows[: len(rows) // 2]), batch_of(rows[len(rows) // 2 :])]
    assert [row for part in parts for row in on_tokens(critic_returns(part, algo, lam), part)] == whole


def test_a_batch_without_values_is_refused() -> None:
    row = Row((True,), 1.0, 0, (0.0,), (0.0,), (0.0,))
    with pytest.raises(ValueError, match="value_T"):
        ESTIMATORS["gae"](replace(batch_of([row]), value_T=None), Algo(estimator="gae"), scores_of([row]))


def test_an_empty_rank_has_empty_advantages() -> None:
    empty = batch_of([])
    assert ESTIMATORS["gae"](empty, Algo(estimator="gae", gae_length_alpha=0.05), scores_of([])).tolist() == []
    assert critic_returns(empty, Algo(estimator="gae")).tolist() == []


def test_thirty_two_thousand_tokens_keep_their_digits() -> None:
    """Against the exact sum of every term, at a few places."""
    length, gamma, lam = 32768, 0.999, 0.99
    generator = torch.Generator().manual_seed(3)
    reward_T, value_T = (torch.randn(length, generator=generator, dtype=torch.float64) for _ in range(2))
    adv_T, _ = gae(reward_T, value_T, torch.ones(length, dtype=torch.bool), torch.tensor([0, length]), gamma=gamma, lam=lam)
    value = [*value_T.tolist(), 0.0]
    delta = [reward + gamma * value[t + 1] - value[t] for t, reward in enumerate(reward_T.tolist())]
    for start in (0, 1, 20000, length - 1):
        terms = [(gamma * lam) ** age * d for age, d in enumerate(delta[start:])]
        assert abs(adv_T[start].item() - math.fsum(terms)) <= 1e-13 * math.fsum(map(abs, terms))


@thorough
@given(st.integers(0, 2**32 - 1))
def test_the_two_ends_of_lambda_and_the_returns(seed: int) -> None:
    """lambda 1: the discounted return less the value. lambda 0: delta alone. Returns are advantages and values together."""
    rows, rng = draw(seed), random.Random(seed)
    batch, gamma = batch_of(rows), rng.choice((1.0, 0.9, 0.5))
    reward_T = torch.where(batch.mask_T, torch.tensor([rng.gauss(0, 1) for _ in range(batch.num_tokens)], dtype=torch.float64), math.nan)
    settings = {"gamma": gamma, "lam": (1.0, torch.ones(len(rows)))[seed % 2]}
    adv_T, return_T = gae(reward_T, batch.value_T, batch.mask_T, batch.cu_len_S1, **settings)
    by_token = {"adv": adv_T, "return": return_T, "value": torch.where(batch.mask_T, batch.value_T, 0.0)}
    by_token["to go"] = compute_returns(reward_T, batch.mask_T, batch.cu_len_S1, gamma)
    by_token["reward"] = torch.where(batch.mask_T, reward_T, 0.0)
    by_token["delta"], _ = gae(reward_T, batch.value_T, batch.mask_T, batch.cu_len_S1, gamma=gamma, lam=0.0)
    found = {name: on_tokens(value_T, batch) for name, value_T in by_token.items()}
    close(found["return"], found["to go"])
    for i, value in enumerate(found["value"]):
        close(found["adv"][i], [r - v for r, v in zip(found["return"][i], value, strict=True)])
        close(found["delta"][i], [r + gamma * n - v for r, v, n in zip(found["reward"][i], value, [*value, 0.0][1:], strict=True)])
