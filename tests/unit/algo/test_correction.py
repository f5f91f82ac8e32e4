"""Weights for the gap between the trainer and the roll-out engine."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algo.correction import Corrected, correction_weights, normalized, summarise
from megatron_rpp.algo.objective import policy_objective
from megatron_rpp.config.correction import from_old_names
from megatron_rpp.config.schema import Algo, Correction
from megatron_rpp.stats.moments import distributed_mean
from tests.reference import losses as loops
from tests.reference.batches import rows_of
from tests.reference.drawn import draw, microbatch
from tests.reference.losses import Kind, Response, Token
from tests.reference.properties import thorough

# w = 2 and 1/4 in the first response, 1 in the second
GAPS = [[math.log(2), -math.log(4)], [0.0]]
LEVELS = ("none", "token", "sequence", "geometric")
RULES = st.builds(
    Correction,
    weight=st.sampled_from(LEVELS),
    weight_clip=st.sampled_from((None, (0.0, 2.0), (0.5, 1.2))),
    weight_normalize=st.booleans(),
    reject=st.sampled_from(LEVELS),
    reject_outside=st.sampled_from(((0.5, 1.2), (0.8, 2.0), (1e-6, 5.0))),
    reject_mode=st.sampled_from(("mask", "zero")),
    veto=st.sampled_from((None, 1e-4, 0.4)),
)
OLDER = st.sampled_from(
    [
        Kind(kind, level, low, high, veto)
        for kind, level, (low, high), veto in product(
            ("tis", "icepop", "mis"), ("token", "sequence", "geometric"), ((0.1, 2.0), (0.5, 1.2), (0.8, 2.0)), (None, 1e-4, 0.4)
        )
    ]
)


def current(older: Kind) -> Correction:
    """What load.py makes of a section with the old names."""
    section, problems = from_old_names(asdict(older), {}, {})
    assert problems == []
    return Correction(**section)


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
    found, got, mask = _correct(_responses(GAPS), current(Kind(kind, level, low=0.5 - 1e-12, high=1.5)))
    assert got == [pytest.approx(row, rel=1e-11) for row in weights]
    assert mask == [[bool(flag) for flag in row] for row in kept]
    assert not found.weight_T.requires_grad


def test_a_geometric_mean_judges_long_responses_as_it_does_short_ones_and_a_product_does_not() -> None:
    long = _responses([[0.01] * 300])
    assert _correct(long, Correction(reject="geometric", reject_outside=(0.9, 1.1)))[2] == [[True] * 300]
    assert _correct(long, Correction(reject="sequence", reject_outside=(0.9, 1.1)))[2] == [[False] * 300]


@pytest.mark.parametrize("kind", ["tis", "icepop", "mis"])
def test_a_veto_leaves_out_the_whole_response_in_the_way_of_its_kind(kind: str) -> None:
    found, weights, mask = _correct(_responses([[0.0, math.log(1e-5)], [0.0]]), current(Kind(kind, low=1e-9, high=2.0, veto=1e-4)))
    assert weights == [[0.0, 0.0], [1.0]]
    assert mask == [[kind != "mis"] * 2, [True]]
    assert summarise(found.sums).vetoed_frac == 0.5


def test_the_statistics_by_hand() -> None:
    """Weights 2 held to 1.5, 0.25, 1: mean 2.75 / 3, ESS 2.75^2 / (3 * (2.25 + 0.0625 + 1)), one of three held, all kept."""
    stats = summarise(_correct(_responses(GAPS), Correction(weight="token", weight_clip=(0.0, 1.5)))[0].sums)
    assert asdict(stats) == pytest.approx(
        {"weight_mean": 2.75 / 3, "ess_frac": 2.75**2 / (3 * 3.3125), "kept_frac": 1.0, "clipped_frac": 1 / 3, "vetoed_frac": 0.0}
    )
    assert summarise(_correct(_responses(GAPS), Correction(reject="token", reject_outside=(0.5, 1.5)))[0].sums).kept_frac == pytest.approx(
        1 / 3
    )


def test_no_token_and_no_survivor_divide_by_nothing() -> None:
    rule = Correction(reject="token", reject_outside=(0.5, 1.5))
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
    found, weights, mask = _correct(_responses([[gap, 0.0], [0.0]]), current(Kind(kind, level, low=0.5, high=2.0)))
    assert weights == [[0.0, 1.0 if level == "token" else 0.0], [1.0]]
    assert mask == [[kind != "mis", kind != "mis" or level == "token"], [True]]
    assert found.sums.isfinite().all()


def test_wild_gaps_are_held_and_finite() -> None:
    _, weights, _ = _correct(_responses([[900.0], [-900.0], [15.0] * 9]), Correction(weight="sequence", weight_clip=(0.0, 1e12)))
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
    weights = torch.tensor([weight for row, _, _ in expected for weight in row], dtype=torch.float64)
    torch.testing.assert_close(whole.weight_T, weights, rtol=1e-12, atol=0)
    assert whole.mask_T.tolist() == [is_left for _, row, _ in expected for is_left in row]
    assert whole.kept_T.tolist() == [is_kept for _, _, row in expected for is_kept in row]
    assert whole.weight_T.isfinite().all()
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
    older = Kind(low=0.5, high=2.0)
    counts = {kind: sum(map(sum, _correct(responses, current(replace(older, kind=kind)))[2])) for kind in ("tis", "icepop", "mis")}
    assert counts == {"tis": 5, "icepop": 5, "mis": 3}
    _, _, batch, adv_T = microbatch([[replace(token, adv=-2.0) for token in response] for response in responses])
    found, _, _ = _correct(responses, current(replace(older, kind="mis")))
    batch = replace(batch, mask_T=found.mask_T, weight_T=torch.ones(5))
    loss, denominator, _ = policy_objective(batch.logp_old_T, None, batch, adv_T, Algo())
    assert loss.item() / denominator.item() == 2.0


@thorough
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4), OLDER)
def test_the_old_names_mean_what_they_meant(seed: int, lengths: list[int], older: Kind) -> None:
    """Against the loops of what kind, level, low and high were; log-probabilities that are no numbers included."""
    responses = draw(seed, lengths)
    if seed % 3 == 0 and responses[0]:
        responses[0][0] = replace(responses[0][0], old=math.inf)
    _, weights, mask = _correct(responses, current(older))
    expected = [loops.corrected_by_kind(response, older) for response in responses]
    assert mask == [row for _, row in expected]
    for got, (row, _) in zip(weights, expected, strict=True):
        assert got == pytest.approx(row, rel=1e-12, abs=0)


# Log-ratios of two responses: token weights e^.8 e^-.1 | e^.2 e^-2, geometric means e^.35 and e^-.9.
MIXED = [[0.8, -0.1], [0.2, -2.0]]


@pytest.mark.parametrize(
    ("rule", "weights", "mask"),
    [
        # token TIS at 2 with a geometric mean outside [.5, 2] out of the mask: the second response, e^-.9 = .4066, is out
        (
            Correction(weight="token", reject="geometric", reject_outside=(0.5, 2.0)),
            [[2.0, math.exp(-0.1)], [0, 0]],
            [[1, 1], [0, 0]],
        ),
        # the same by the product: e^.7 = 2.0138 and e^-1.8 = .1653 are both outside
        (Correction(weight="token", reject="sequence", reject_outside=(0.5, 2.0)), [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        # the ratio that rejects is the raw one: e^.8 = 2.2255 is outside although its weight would be truncated to 1.5
        (
            Correction(weight="token", weight_clip=(0.0, 1.5), reject="token", reject_outside=(0.5, 2.0)),
            [[0, math.exp(-0.1)], [math.exp(0.2), 0]],
            [[0, 1], [1, 0]],
        ),
        # rejection alone: weights of 1
        (Correction(reject="geometric", reject_outside=(0.5, 2.0)), [[1, 1], [0, 0]], [[1, 1], [0, 0]]),
        # rejected to weight 0, the mask stays
        (Correction(reject="geometric", reject_outside=(0.5, 2.0), reject_mode="zero"), [[1, 1], [0, 0]], [[1, 1], [1, 1]]),
        # a sequence weight with a token rejection: e^.7 truncated to 2 and e^-1.8, on the tokens that are left
        (
            Correction(weight="sequence", reject="token", reject_outside=(0.5, 2.0)),
            [[0, 2.0], [math.exp(-1.8), 0]],
            [[0, 1], [1, 0]],
        ),
        # a veto alone, of tokens below .2: e^-2 = .1353
        (Correction(veto=0.2), [[1, 1], [0, 0]], [[1, 1], [0, 0]]),
        (Correction(weight="token", veto=0.2, reject_mode="zero"), [[2.0, math.exp(-0.1)], [0, 0]], [[1, 1], [1, 1]]),
    ],
)
def test_combinations_by_hand(rule: Correction, weights: list[list[float]], mask: list[list[int]]) -> None:
    found, got, left = _correct(_responses(MIXED), rule)
    assert got == [pytest.approx(row, rel=1e-12) for row in weights]
    assert left == [[bool(flag) for flag in row] for row in mask]
    assert rows_of(found.kept_T, microbatch(_responses(MIXED))[2]) == [[weight > 0 for weight in row] for row in weights]


def test_normalized_weights_by_hand() -> None:
    """Token TIS at 1.5 of 2, 1/4 | 1, of which a token rejection outside [.5, 5] leaves 1.5 and 1: mean 1.25, so 1.2 and .8."""
    rule = Correction(weight="token", weight_clip=(0.0, 1.5), weight_normalize=True, reject="token", reject_outside=(0.5, 5.0))
    found, _, _ = _correct(_responses(GAPS), rule)
    mean = distributed_mean(found.weight_T, found.kept_T, None, empty=1.0)
    assert mean == 1.25
    assert normalized(found.weight_T, mean).tolist() == pytest.approx([1.2, 0.0, 0.8])


@thorough
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4), RULES)
def test_a_weight_and_a_rejection_are_the_product_of_both(seed: int, lengths: list[int], rule: Correction) -> None:
    """Each part by itself decides alone: the mask is that of the rejection, the weight that of the weight on what both keep."""
    responses = draw(seed, lengths)
    both, weights, mask = _correct(responses, rule)
    _, weight_alone, _ = _correct(responses, replace(rule, reject="none", veto=None))
    _, rejection_alone, mask_alone = _correct(responses, replace(rule, weight="none"))
    assert mask == mask_alone
    assert weights == [[w * r for w, r in zip(*pair, strict=True)] for pair in zip(weight_alone, rejection_alone, strict=True)]
    if (rule.reject, rule.veto) == ("none", None):
        assert torch.equal(both.mask_T, microbatch(responses)[2].mask_T)


@thorough
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4), RULES)
def test_normalized_weights_have_mean_1_over_the_tokens_that_are_kept(seed: int, lengths: list[int], rule: Correction) -> None:
    """As the loops have it over the whole batch. With no token kept nothing is divided, and nothing is NaN."""
    responses = draw(seed, lengths)
    rule = replace(rule, weight_normalize=True)
    found, _, _ = _correct(responses, rule)
    mean = distributed_mean(found.weight_T, found.kept_T, None, empty=1.0)
    weight_T = normalized(found.weight_T, mean)
    expected = [weight for row in loops.corrected_batch(responses, rule)[0] for weight in row]
    assert weight_T.tolist() == pytest.approx(expected, rel=1e-11)
    if found.kept_T.any():
        assert weight_T[found.kept_T].mean().item() == pytest.approx(1.0, rel=1e-12)
    assert weight_T.isfinite().all()
    assert not weight_T[~found.kept_T].any()
