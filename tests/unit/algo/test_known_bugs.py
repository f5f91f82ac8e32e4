"""Mistakes of other frameworks, each with its report, on an input where it would show.

Elsewhere: statistics that miss a rank or hang on an empty one (slime#2235, miles#3229) in tests/dist/test_credit.py and
tests/dist/test_moments.py, those that miss or repeat context-parallel ranks in tests/dist/test_step_credit.py; the geometric mean
with token weights (verl#3245) in test_correction.py; an estimator that no name leads to (Relax#177) in test_advantage.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_rpp.algo.advantage import compute_advantages
from megatron_rpp.algo.estimators import ESTIMATORS
from megatron_rpp.algo.returns import kl_penalties
from megatron_rpp.algo.shaping import drop_truncated
from megatron_rpp.config.load import load
from megatron_rpp.config.schema import NORMALISED, Algo, EstimatorName
from megatron_rpp.errors import ConfigError, NumericsError
from megatron_rpp.stats.moments import whiten
from tests.reference.batches import close
from tests.reference.cases import Row, batch_of, on_tokens, scores_of

NEED_GROUPS: tuple[EstimatorName, ...] = ("reinforce_pp_baseline", "rloo", "grpo", "dr_grpo")
# Three, two, four and one token; the toy of shared/research, with x = logp_old - logp_ref of .1 .2 -.1 | .2 -.3 | .1 0 .2 -.1 | -.1
X = ((0.1, 0.2, -0.1), (0.2, -0.3), (0.1, 0.0, 0.2, -0.1), (-0.1,))


def toy(scores: Sequence[float], groups: Sequence[int] = (0, 0, 1, 1)) -> list[Row]:
    return [
        Row((True,) * len(x), score, group, x, (0.0,) * len(x), (0.0,) * len(x)) for x, score, group in zip(X, scores, groups, strict=True)
    ]


def masked(mask: str, score: float, group: int = 0, x: float = 0.0) -> Row:
    """mask as a word of 1 and 0; a log-ratio of x at every place, tool's answers included."""
    flags = tuple(flag == "1" for flag in mask)
    return Row(flags, score, group, (x,) * len(flags), (0.0,) * len(flags), (0.0,) * len(flags))


def raw(rows: Sequence[Row], **options: object) -> list[list[float]]:
    algo, batch = Algo(**options), batch_of(rows, outside=None)
    greedy = [0.25] * (1 + max(row.group for row in rows))
    scores = scores_of(rows, greedy=greedy, penalties=kl_penalties(batch, algo.kl_reward_coef).tolist())
    return on_tokens(ESTIMATORS[algo.estimator](batch, algo, scores), batch)


def final(rows: Sequence[Row], *, kept: bool = False, **options: object) -> list[list[float]]:
    algo, batch = Algo(**options), batch_of(rows)
    normaliser = partial(whiten, group=None, rescale=algo.estimator in NORMALISED)
    kept_T = drop_truncated(batch).mask_T if kept else None
    return on_tokens(compute_advantages(batch, algo, scores=scores_of(rows), normaliser=normaliser, kept_T=kept_T)[0], batch)


def test_verl_7278_the_turns_before_a_tools_answer_lose_their_return() -> None:
    """verl zeroes the running return at every unmasked token: 0 0 . . 1 1."""
    assert raw([masked("110011", 1.0)], estimator="reinforce_pp") == [[1.0] * 4]


def test_openrlhf_lets_gamma_decay_through_a_tools_answer() -> None:
    """There .59049 .6561 . . .9 1: two powers too many for the first turn."""
    close(raw([masked("110011", 1.0)], estimator="reinforce_pp", gamma=0.9), [[0.729, 0.81, 0.9, 1.0]])


@pytest.mark.parametrize("estimator", ["reinforce_pp", "gae", "rloo"])
def test_slime_1372_and_miles_1383_charge_a_tools_answer_for_its_kl(estimator: EstimatorName) -> None:
    """x is 2 at each of six places, four of them written: 4 * .1 * 2 = .8 and not 1.2 is what the response pays."""
    rows = [masked("110011", 1.0, x=2.0), masked("1", 1.0)]
    paid = {"rloo": [-0.8] * 4}.get(estimator, [0.2, 0.4, 0.6, 0.8])
    close(raw(rows, estimator=estimator, kl_reward_coef=0.1)[0], paid)


def test_slime_1369_the_mean_comes_back_after_the_scaling() -> None:
    """6 and 10 without recentring: deviation 2, so 3 and 5. With shift_mean=False there it is (6 - 8) / 2 + 8 = 7, and 9."""
    batch = batch_of([masked("1", 6.0), masked("1", 10.0)])
    normaliser = partial(whiten, group=None, recentre=False)
    algo = Algo(estimator="reinforce_pp")
    adv_T, _ = compute_advantages(batch, algo, scores=scores_of([]), normaliser=normaliser)
    assert adv_T.tolist() == [3.0, 5.0]


def test_slime_1414_unequal_groups_become_one_group_of_the_whole_batch() -> None:
    """Three and two responses: means 1/3 and 5, not 11/5."""
    rows = [masked("1", score, group) for score, group in ((1.0, 0), (0.0, 0), (0.0, 0), (4.0, 1), (6.0, 1))]
    close(raw(rows, estimator="dr_grpo"), [[2 / 3], [-1 / 3], [-1 / 3], [-1.0], [1.0]])


@pytest.mark.parametrize("estimator", NEED_GROUPS)
def test_openrlhf_takes_groups_by_their_position(estimator: EstimatorName) -> None:
    """Interleaved prompts, and one response of the first was dropped: by position 0.1 would be compared with 9."""
    rows = [masked("1", score, group) for score, group in ((0.1, 7), (9.0, 3), (0.3, 7), (5.0, 3), (9.0, 3))]
    tidy = sorted(range(5), key=lambda i: rows[i].group)
    got, expected = raw(rows, estimator=estimator), raw([rows[i] for i in tidy], estimator=estimator)
    assert [got[i] for i in tidy] == expected
    assert got[0][0] < 0 < got[2][0]


@pytest.mark.parametrize("estimator", NEED_GROUPS)
def test_rllm_916_a_single_response_teaches_nothing_or_turns_into_reinforce_pp(estimator: EstimatorName) -> None:
    """rllm and slime make zeros of it, verl keeps the raw score. Here it is refused by name."""
    with pytest.raises(NumericsError, match="group 1"):
        raw([masked("1", 1.0), masked("1", 0.0), masked("1", 1.0, 1)], estimator=estimator)


def test_nemo_3837_failed_rollouts_count_in_the_groups_mean() -> None:
    """There the mean is over ones_like: rows that are no samples count with 0. Here a group is exactly its responses: one without a
    token of the policy is still a sample with a score, and what failed is not in the group at all."""
    sampled = [masked("1", 1.0), masked("1", 0.0), masked("00", 0.5)]
    assert raw(sampled, estimator="dr_grpo") == [[0.5], [-0.5], []]
    assert raw(sampled[:2], estimator="dr_grpo") == [[0.5], [-0.5]]


@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_verl_1527_the_baseline_variant_forgets_to_mask_after_whitening(estimator: EstimatorName) -> None:
    """A padded or tool's token would hold -mean / std. `on_tokens` refuses anything but 0 there."""
    batch = batch_of([masked("0110", 1.0), masked("100", 0.0)])
    normaliser = partial(whiten, group=None, rescale=True)
    scores = scores_of([masked("0110", 1.0), masked("100", 0.0)], greedy=[0.5])
    adv_T, _ = compute_advantages(batch, Algo(estimator=estimator), scores=scores, normaliser=normaliser)
    assert [len(row) for row in on_tokens(adv_T, batch)] == [2, 1]
    assert adv_T[~batch.mask_T].tolist() == [0.0] * 4


def test_axolotl_3693_one_estimator_under_anothers_name() -> None:
    """On a batch with groups of different spread, lengths, KL and values, no two of the seven agree."""
    rows = [
        *(masked("1" * length, score, 0, 0.3) for score, length in ((1.0, 2), (0.0, 3), (0.25, 1))),
        *(masked("1" * length, score, 1, -0.2) for score, length in ((3.0, 2), (0.0, 1))),
    ]
    options = {"kl_reward_coef": 0.1, "gae_lambda": 0.5}
    found = {name: raw(rows, estimator=name, **options) for name in ESTIMATORS}
    same = {pair for pair in combinations(found, 2) if found[pair[0]] == found[pair[1]]}
    assert same == {("reinforce_pp_baseline", "dr_grpo")}  # apart by what follows: one is whitened, and the lengths' divisor
    assert "reinforce_pp_baseline" in NORMALISED
    assert "dr_grpo" not in NORMALISED


def test_axolotl_3731_a_switch_that_says_false_is_on(tmp_path: Path) -> None:
    """There a string counted as true. Here `off` is off, `false` is false, and a string in its place is refused."""
    run = tmp_path / "run.yaml"
    run.write_text("model: {hf: none}\ndata: {train: none}\nstats: {normalise: off}\nalgo: {grpo_std_unbiased: false}\n")
    cfg = load(run)
    assert (cfg.stats.normalise, cfg.algo.grpo_std_unbiased) == ("off", False)
    run.write_text(run.read_text().replace("false", '"false"'))
    with pytest.raises(ConfigError, match=r"algo\.grpo_std_unbiased: expected true or false"):
        load(run)


def test_roll_a_batch_deviation_turns_scores_into_a_matrix() -> None:
    """ROLL's group mean with a batch std broadcasts [2, 2] over [2]: (2, 4) numbers of 4 scores. Ours: one for each, divided by the
    deviation of 0 1 2 5, which is sqrt(14 / 3)."""
    rows = [masked("1", score, group) for score, group in ((0.0, 0), (1.0, 0), (2.0, 1), (5.0, 1))]
    got = raw(rows, estimator="grpo", grpo_std="batch", grpo_std_eps=0.0)
    close(got, [[centred / math.sqrt(14 / 3)] for centred in (-0.5, 0.5, -1.5, 1.5)])


def test_trl_2575_rloo_takes_its_kl_by_token_after_the_baseline() -> None:
    """beta .1, R = 1 0 1 -1: the whole response's KL of .2 -.1 .2 -.1 is in the score that is compared, so .98 - .01 = .97 on every
    token of the first. By token after the baseline it would be .98 .99 1.01."""
    got = raw(toy([1.0, 0.0, 1.0, -1.0]), estimator="rloo", kl_reward_coef=0.1)
    close(got, [[0.97] * 3, [-0.97] * 2, [1.97] * 4, [-1.97]])


def test_kl_in_the_reward_of_the_baseline_variant_is_the_suffix_sum() -> None:
    """Three meanings are about: that of OpenRLHF, of slime and NeMo-RL (by token, .2017982155 .1875870735 .2302204994), and of verl
    (the whole sequence before the baseline, .2025918529)."""
    got = final(toy([1.0, 0.0, 1.0, -1.0]), estimator="reinforce_pp_baseline", kl_reward_coef=0.1)
    close(got[0], [0.1859535227, 0.2002576398, 0.2288658741], rtol=1e-9)


def test_openrlhf_drop_last_dropped_rows_stay_in_the_statistics() -> None:
    """Truncated responses that leave the loss leave mean and deviation too, and stay in the mean of their group: centred +-1/2, over
    the five tokens left +1/2 three times, so mean .1 and variance .24."""
    rows = [masked("11", 1.0), masked("11", 0.0), masked("11", 0.0), masked("1", 1.0)]
    rows[2] = replace(rows[2], is_truncated=True)
    right, wrong = 0.4 / math.sqrt(0.24), -0.6 / math.sqrt(0.24)
    close(final(rows, kept=True, estimator="reinforce_pp_baseline"), [[right] * 2, [wrong] * 2, [0.0] * 2, [right]])


@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_openrlhf_773_without_a_kl_coefficient_no_reference_is_asked_for(estimator: EstimatorName) -> None:
    rows = [masked("11", 1.0), masked("1", 0.0)]
    batch = replace(batch_of(rows), logp_old_T=None, logp_ref_T=None)
    adv_T = ESTIMATORS[estimator](batch, Algo(estimator=estimator), scores_of(rows, greedy=[0.5]))
    assert on_tokens(adv_T, batch)[0][0] > 0


def test_float32_copies_of_one_score_explode() -> None:
    """torch.std of eight float32 0.7 is 6.4e-8, and with eps 1e-9 the advantage .92; here it is exactly 0, whatever eps is."""
    same = torch.full((8,), 0.7)
    rows = [masked("1", float(value)) for value in same]
    for estimator in NEED_GROUPS:
        assert final(rows, estimator=estimator, grpo_std_eps=0.0) == [[0.0]] * 8


def test_areal_leaves_out_one_token_in_place_of_one_sample() -> None:
    """k 4, lengths 3 2 4 1, R = 1 0 0 1: over tokens .6667 -.4444 -.4444 .6667."""
    got = raw(toy([1.0, 0.0, 0.0, 1.0], (0, 0, 0, 0)), estimator="rloo")
    close(got, [[2 / 3] * 3, [-2 / 3] * 2, [-2 / 3] * 4, [2 / 3]])


def test_openrlhf_clips_the_score_after_the_baseline() -> None:
    """30 0 0 2 held to 10 is centred 7 -3 -3 -1; clipped late 10 -8 -8 -6."""
    rows = [masked("1", score) for score in (30.0, 0.0, 0.0, 2.0)]
    for estimator in ("reinforce_pp_baseline", "dr_grpo"):
        assert raw(rows, estimator=estimator) == [[7.0], [-3.0], [-3.0], [-1.0]]
    close(raw(rows, estimator="rloo"), [[28 / 3], [-4.0], [-4.0], [-4 / 3]])
