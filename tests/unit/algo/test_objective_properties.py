"""Every loss with every aggregation, correction and divergence: value and gradient against loops, and what may not change them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algo.correction import correction_weights
from megatron_rpp.algo.objective import MAX_SUFFIX, policy_objective
from megatron_rpp.config.schema import AggregateName, Algo, Correction, KlLossName, LossName
from tests.reference import losses as loops
from tests.reference.batches import rows_of
from tests.reference.drawn import Microbatch, draw, microbatch
from tests.reference.losses import Response
from tests.reference.properties import thorough

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=4)
RULES = [
    Correction(
        weight=weight,
        weight_clip=(0.6, 1.6) if number % 2 else None,
        reject=reject,
        reject_outside=(0.6, 1.6),
        reject_mode=mode,
        veto=0.3 if reject == "geometric" else None,
    )
    for number, (weight, reject, mode) in enumerate(
        itertools.product(("none", "token", "sequence"), ("none", "token", "sequence", "geometric"), ("mask", "zero"))
    )
]
ALGOS = st.sampled_from(
    [
        Algo(
            loss=loss,
            aggregate=aggregate,
            aggregate_tokens=7,
            kl_loss=kl_loss,
            kl_loss_coef=0.3 if number % 3 else 0.0,
            entropy_coef=0.05 if number % 2 else 0.0,
            clip_low=(0.1, 0.2, 1.0)[number % 3],
            clip_high=(0.1, 0.28, 4.0)[number // 3 % 3],
            dual_clip=1.4 if loss == "ppo_clip" and number % 5 < 2 else None,
        )
        for number, (loss, aggregate, kl_loss) in enumerate(
            itertools.product(get_args(LossName), get_args(AggregateName), get_args(KlLossName))
        )
    ]
)


def _corrected(responses: list[Response], correction: Correction) -> list[Response]:
    """The same responses with the loops' weights and masks."""
    return [
        [replace(token, weight=w, is_masked=is_left) for token, w, is_left in zip(response, weights, mask, strict=True)]
        for response, weights, mask in zip(responses, *loops.corrected_batch(responses, correction), strict=True)
    ]


def _gradient(parts: Iterable[Microbatch], algo: Algo) -> tuple[float, list[Tensor], dict[str, float]]:
    """What a step makes of its microbatches: the loss divided once, its gradient in each, and metrics added up."""
    parts = list(parts)
    answers = [policy_objective(*part, algo) for part in parts]
    denominator = max(sum(int(answer[1]) for answer in answers), 1)
    loss = sum(answer[0] for answer in answers) / denominator
    loss.backward()
    metrics = {name: [float(answer[2][name]) for answer in answers] for name in answers[0][2]}
    added = {name: max(values) if name.endswith(MAX_SUFFIX) else math.fsum(values) for name, values in metrics.items()}
    return loss.item(), [part[0].grad for part in parts], added


def _agree(responses: Sequence[Response], algo: Algo) -> None:
    part = microbatch(responses)
    value, (gradient_T,), _ = _gradient([part], algo)
    assert value == pytest.approx(loops.objective(responses, algo), rel=1e-11, abs=1e-12)
    expected = [value for row in loops.gradient(responses, algo) for value in row]
    assert gradient_T.tolist() == pytest.approx(expected, rel=2e-6, abs=2e-8)


@pytest.mark.parametrize("aggregate", get_args(AggregateName))
@pytest.mark.parametrize("loss", get_args(LossName))
def test_every_loss_with_every_aggregation_and_correction_is_what_the_loops_say(loss: LossName, aggregate: AggregateName) -> None:
    """Weights and masks from the package's own correction; values, and gradients by central differences, from the loops."""
    algo = Algo(loss=loss, aggregate=aggregate, aggregate_tokens=7, clip_low=0.2, clip_high=0.28, kl_loss_coef=0.1, entropy_coef=0.01)
    for seed, rule in enumerate(RULES):
        responses = draw(seed, (5, 0, 1, 6))
        assert not loops.is_near_a_kink(responses, algo)
        new_T, entropy_T, batch, adv_T = microbatch(responses)
        found = correction_weights(batch.logp_old_T, batch.logp_rollout_T, batch.mask_T, batch.cu_len_S1, rule)
        part = new_T, entropy_T, replace(batch, weight_T=found.weight_T, mask_T=found.mask_T), adv_T
        value, (gradient_T,), _ = _gradient([part], algo)
        expected = _corrected(responses, rule)
        assert value == pytest.approx(loops.objective(expected, algo), rel=1e-11, abs=1e-13), rule
        assert gradient_T.tolist() == pytest.approx([g for row in loops.gradient(expected, algo) for g in row], rel=2e-6, abs=2e-8), rule


@thorough
@given(SEEDS, LENGTHS, ALGOS)
def test_value_and_gradient_are_those_of_the_loops(seed: int, lengths: list[int], algo: Algo) -> None:
    """NaN is stored wherever the mask is 0, so these examples are also the proof that nothing there is read."""
    responses = draw(seed, lengths)
    assume(not loops.is_near_a_kink(responses, algo))
    _agree(responses, algo)


@thorough
@given(SEEDS, LENGTHS, ALGOS, st.integers(0, 31))
def test_cuts_ranks_and_order_change_neither_loss_nor_gradient_nor_metrics(seed: int, lengths: list[int], algo: Algo, deal: int) -> None:
    """Responses are dealt in another order to two microbatches, one of which may stay empty; a row more has no token at all."""
    responses = draw(seed, [*lengths, 2])
    responses[-1] = [replace(token, is_masked=False) for token in responses[-1]]
    part = microbatch(responses)
    value, (gradient_T,), metrics = _gradient([part], algo)
    whole = rows_of(gradient_T, part[2])
    assert gradient_T.isfinite().all()
    hands: list[list[int]] = [[], []]
    for i in reversed(range(len(responses))):
        hands[deal >> i & 1].append(i)
    parts = [microbatch([responses[i] for i in hand]) for hand in hands]
    got, gradients, added = _gradient(parts, algo)
    assert got == pytest.approx(value, rel=1e-11, abs=1e-13)
    assert added == pytest.approx(metrics, rel=1e-10, abs=1e-12)
    for hand, part, part_gradient_T in zip(hands, parts, gradients, strict=True):
        for i, row in zip(hand, rows_of(part_gradient_T, part[2])[: len(hand)], strict=True):
            assert all(math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-14) for a, b in zip(row, whole[i], strict=True))


@thorough
@given(SEEDS, LENGTHS, ALGOS)
def test_bfloat16_and_float32_inputs_are_those_numbers_in_float32(seed: int, lengths: list[int], algo: Algo) -> None:
    new_T, entropy_T, batch, adv_T = microbatch(draw(seed, lengths), torch.bfloat16)
    new_T = new_T.detach()
    half = policy_objective(new_T, entropy_T, batch, adv_T, algo)
    names = ("logp_old_T", "logp_ref_T", "weight_T")
    wide = replace(batch, **{name: getattr(batch, name).float() for name in names})
    single = policy_objective(new_T.float(), entropy_T.float(), wide, adv_T, algo)
    assert half[0].dtype == torch.float32
    assert half[0].item() == single[0].item()
    assert {name: value.item() for name, value in half[2].items()} == {name: value.item() for name, value in single[2].items()}


def test_a_mean_of_microbatch_means_is_another_number() -> None:
    """What the sums are there for: 3 tokens of loss 2 and 1 of 6 have the token mean 3, and the mean of their means is 4."""
    responses = draw(0, (3, 1), masked=1.0)
    shaped = [[replace(token, new=-value, adv=1.0, weight=1.0) for token in r] for r, value in zip(responses, (2.0, 6.0), strict=True)]
    algo = Algo(loss="reinforce")
    parts = [policy_objective(*microbatch([response]), algo) for response in shaped]
    assert sum(part[0].item() for part in parts) / sum(int(part[1]) for part in parts) == 3.0
    assert sum(part[0].item() / int(part[1]) for part in parts) / 2 == 4.0
