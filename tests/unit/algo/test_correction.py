"""Weights for the gap between the trainer and the roll-out engine."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.correction import Corrected, correction_weights, summarise
from megatron_rpp.algo.objective import policy_objective
from megatron_rpp.config.schema import Algo, Correction
from tests.reference import losses as loops
from tests.reference.batches import rows_of
from tests.reference.drawn import draw, microbatch
from tests.reference.losses import Response, Token
from tests.reference.properties import thorough

# w = 2 and 1/4 in the first response, 1 in the second
GAPS = [[math.log(2), -math.log(4)], [0.0]]
RULES = st.sampled_from(
    [
        Correction(kind=kind, level=level, low=low, high=high, veto=veto)
        for kind, level, (low, high), veto in product(
            ("tis", "icepop", "mis"), ("token", "sequence", "geometric"), ((0.0, 2.0), (0.5, 1.2), (0.8, 2.0)), (None, 1e-4, 0.4)
        )
    ]
)


def _responses(gaps: list[list[float]]) -> list[Response]:
    return [[Token(True, old=gap, rollout=0.0) for gap in row] for row in gaps]


def _correct(responses: list[Response], rule: Correction) -> tuple[Corrected, list[list[float]], list[list[bool]]]:
    """What the package says, and its weights and mask by response."""
    _, _, batch, _ = microbatch(responses)
    found = correction_weights(batch.logp_old_T, batch.logp_rollout_T, batch.mask_T, batch.cu_len_S1, rule)
    return found, rows_of(found.weight_T, batch), rows_of(found.mask_T, batch)


@pytest.mark.parametrize(
    ("kind", "level", "weights", "kept"),
    [
        ("none", "token", [[1, 1], [1]], [[1, 1], [1]]),
        ("tis", "token", [[1.5, 0.5], [1]], [[1, 1], [1]]),
        ("tis", "sequence", [[0.5, 0.5], [1]], [[1, 1], [1]]),
        ("tis", "geometric", [[0.5**0.5, 0.5**0.5], [1]], [[1, 1], [1]]),
        ("icepop", "token", [[0, 0], [1]], [[1, 1], [1]]),
        ("icepop", "sequence", [[2, 0.25], [1]], [[1, 1], [1]]),  # the product, 0.5, is on the bound: inside
        ("icepop", "geometric", [[2, 0.25], [1]], [[1, 1], [1]]),  # what is kept has its own weights
        ("mis", "token", [[0, 0], [1]], [[0, 0], [1]]),
        ("mis", "sequence", [[2, 0.25], [1]], [[1, 1], [1]]),
    ],
)
def test_each_kind_at_each_level_by_hand(kind: str, level: str, weights: list[list[float]], kept: list[list[float]]) -> None:
    """A geometric mean keeps or drops, and the tokens have weights of their own: their shapes met in verl#3245."""
    found, got, mask = _correct(_responses(GAPS), Correction(kind=kind, level=level, low=0.5 - 1e-12, high=1.5))
    assert got == [pytest.approx(row, rel=1e-11) for row in weights]
    assert mask == [[bool(flag) for flag in row] for row in kept]
    assert not found.weight_T.requires_grad


def test_a_geometric_mean_judges_long_responses_as_it_does_short_ones_and_a_product_does_not() -> None:
    long = _responses([[0.01] * 300])
    assert _correct(long, Correction(kind="mis", level="geometric", low=0.9, high=1.1))[2] == [[True] * 300]
    assert _correct(long, Correction(kind="mis", level="sequence", low=0.9, high=1.1))[2] == [[False] * 300]


@pytest.mark.parametrize("kind", ["tis", "icepop", "mis"])
def test_a_veto_leaves_out_the_whole_response_in_the_way_of_its_kind(kind: str) -> None:
    found, weights, mask = _correct(_responses([[0.0, math.log(1e-5)], [0.0]]), Correction(kind=kind, low=0.0, high=2.0, veto=1e-4))
    assert weights == [[0.0, 0.0], [1.0]]
    assert mask == [[kind != "mis"] * 2, [True]]
    assert summarise(found.sums).vetoed_frac == 0.5


def test_the_statistics_by_hand() -> None:
    """Weights 2 held to 1.5, 0.25, 1: mean 2.75 / 3, ESS 2.75^2 / (3 * (2.25 + 0.0625 + 1)), one of three held, all kept."""
    stats = summarise(_correct(_responses(GAPS), Correction(kind="tis", low=0.0, high=1.5))[0].sums)
    assert asdict(stats) == pytest.approx(
        {"weight_mean": 2.75 / 3, "ess_frac": 2.75**2 / (3 * 3.3125), "kept_frac": 1.0, "clipped_frac": 1 / 3, "vetoed_frac": 0.0}
    )
    assert summarise(_correct(_responses(GAPS), Correction(kind="mis", low=0.5, high=1.5))[0].sums).kept_frac == pytest.approx(1 / 3)


def test_no_token_and_no_survivor_divide_by_nothing() -> None:
    rule = Correction(kind="mis", low=0.5, high=1.5)
    assert asdict(summarise(_correct([], rule)[0].sums)) == {
        "weight_mean": 1.0,
        "ess_frac": 1.0,
        "kept_frac": 1.0,
        "clipped_frac": 0.0,
        "vetoed_frac": 0.0,
    }
    assert summarise(_correct(_responses([[3.0]]), rule)[0].sums).ess_frac == 0.0


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["tis", "icepop", "mis"])
def test_a_log_probability_that_is_no_number_takes_out_its_token_and_spreads_no_further_than_what_is_judged(
    kind: str, level: str, gap: float
) -> None:
    found, weights, mask = _correct(_responses([[gap, 0.0], [0.0]]), Correction(kind=kind, level=level, low=0.5, high=2.0))
    assert weights == [[0.0, 1.0 if level == "token" else 0.0], [1.0]]
    assert mask == [[kind != "mis", kind != "mis" or level == "token"], [True]]
    assert found.sums.isfinite().all()


def test_wild_gaps_are_held_and_finite() -> None:
    _, weights, _ = _correct(_responses([[900.0], [-900.0], [15.0] * 9]), Correction(kind="tis", level="sequence", low=0.0, high=1e12))
    assert [row[0] for row in weights] == pytest.approx([math.exp(20), math.exp(-20), math.exp(20)])


@thorough
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4), RULES, st.integers(0, 4))
def test_weights_and_masks_are_those_of_the_loops_however_the_responses_are_cut(
    seed: int, lengths: list[int], rule: Correction, cut: int
) -> None:
    """NaN is stored wherever the mask is 0. Sums of two parts add up to those of the whole."""
    responses = draw(seed, lengths)
    _, _, batch, _ = microbatch(responses)
    whole = correction_weights(batch.logp_old_T, batch.logp_rollout_T, batch.mask_T, batch.cu_len_S1, rule)
    expected = [loops.corrected(response, rule) for response in responses]
    weights = torch.tensor([weight for row, _ in expected for weight in row], dtype=torch.float64)
    torch.testing.assert_close(whole.weight_T, weights, rtol=1e-12, atol=0)
    assert whole.mask_T.tolist() == [is_kept for _, row in expected for is_kept in row]
    parts = []
    for a, b in pairwise((0, min(cut, len(responses)), len(responses))):
        bounds = batch.cu_len_S1[a : b + 1]
        tokens = slice(int(bounds[0]), int(bounds[-1]))
        values = (batch.logp_old_T[tokens], batch.logp_rollout_T[tokens], batch.mask_T[tokens])
        parts.append(correction_weights(*values, bounds - bounds[0], rule))
    assert torch.equal(torch.cat([part.weight_T for part in parts]), whole.weight_T)  # bit for bit
    torch.testing.assert_close(parts[0].sums + parts[1].sums, whole.sums, rtol=1e-13, atol=0)


def test_only_mis_changes_what_the_loss_is_divided_by() -> None:
    """5 tokens, 2 of them outside: 5 for tis and icepop, 3 for mis (AReaL and slime keep the original, verl shrinks). What leaves
    the numerator of mis leaves the denominator too, which TRL#6369 forgot: the loss is a mean of what is left."""
    responses = _responses([[0.0, 2.0, 0.0], [-3.0, 0.1]])
    rule = Correction(kind="tis", low=0.5, high=2.0)
    counts = {kind: sum(map(sum, _correct(responses, replace(rule, kind=kind))[2])) for kind in ("tis", "icepop", "mis")}
    assert counts == {"tis": 5, "icepop": 5, "mis": 3}
    _, _, batch, adv_T = microbatch([[replace(token, adv=-2.0) for token in response] for response in responses])
    found, _, _ = _correct(responses, replace(rule, kind="mis"))
    batch = replace(batch, mask_T=found.mask_T, weight_T=torch.ones(5))
    loss, denominator, _ = policy_objective(batch.logp_old_T, None, batch, adv_T, Algo())
    assert loss.item() / denominator.item() == 2.0
