"""Credit over ranks: whatever the settings, a batch that is split gets the bits that it gets on one rank."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.algo.gae import critic_returns
from megatron_rpp.config.schema import Algo, Config, Correction, Critic, Data, Model, Reward, Rollout, Stats
from megatron_rpp.credit import Credit, Credited
from megatron_rpp.data.packing import assign_ranks, pack_groups, token_index
from megatron_rpp.dist.groups import Groups
from megatron_rpp.dist.layout import Coords
from megatron_rpp.errors import NumericsError
from megatron_rpp.types import Group, PackedBatch, Prompt, Response
from tests.dist.ranks import run_ranks

RANKS, MAX_TOKENS = 4, 12
Answers = list[dict[str, tuple[Credited, Credited, Credited]]]

CASES: dict[str, dict[str, Any]] = {
    "rloo, its KL in the score": {"algo": Algo(estimator="rloo", kl_reward_coef=0.3)},
    "remax": {"algo": Algo(estimator="remax", kl_reward_coef=0.1)},
    "grpo, deviation of the batch": {"algo": Algo(estimator="grpo", grpo_std="batch")},
    "gae": {"algo": Algo(estimator="gae", kl_reward_coef=0.1, gae_length_alpha=0.2)},
    "reinforce_pp by domain": {"algo": Algo(estimator="reinforce_pp", kl_reward_coef=0.1), "stats": Stats(scope="domain")},
    "rloo without truncated": {"algo": Algo(estimator="rloo", kl_reward_coef=0.3, filter_truncated=True)},
    "baseline without truncated": {"algo": Algo(filter_truncated=True), "reward": Reward(overlong_frac=0.5, truncated_coef=0.5)},
    "gae, the critic's own lambda": {
        "algo": Algo(estimator="gae", kl_reward_coef=0.1, gae_lambda=0.95),
        "critic": Critic(gae_lambda=0.5),
    },
    "baseline, mis": {
        "algo": Algo(),
        "correction": Correction(weight="token", weight_clip=None, reject="token", reject_outside=(0.8, 1.3), veto=0.57),
    },
    "dr_grpo, tis": {
        "algo": Algo(estimator="dr_grpo"),
        "correction": Correction(weight="geometric", weight_clip=(0.0, 0.75)),
    },
    "baseline, tis normalized, geometric rejection": {
        "algo": Algo(filter_truncated=True),
        "correction": Correction(
            weight="token", weight_clip=(0.0, 0.9), weight_normalize=True, reject="geometric", reject_outside=(0.7, 0.8), veto=0.56
        ),
    },
    "baseline, icepop normalized": {
        "algo": Algo(),
        "correction": Correction(
            weight="token", weight_normalize=True, reject="token", reject_outside=(0.65, 0.9), reject_mode="zero"
        ),
    },
    "baseline, nothing is left": {
        "algo": Algo(),
        "correction": Correction(weight="token", weight_normalize=True, reject="sequence", reject_outside=(1e7, 1e8)),
    },
}


# All responses are truncated, and filtered out.
EMPTY: dict[str, dict[str, Any]] = {
    "all truncated, baseline": {"algo": Algo(filter_truncated=True), "stats": Stats(scope="domain")},
    "all truncated, rloo": {"algo": Algo(estimator="rloo", kl_reward_coef=0.3, filter_truncated=True)},
    "all truncated, gae": {"algo": Algo(estimator="gae", filter_truncated=True)},
    "all truncated, tis normalized": {
        "algo": Algo(filter_truncated=True),
        "correction": Correction(weight="token", weight_normalize=True),
    },
}


def make_config(case: str) -> Config:
    rollout = Rollout(max_response_tokens=MAX_TOKENS)
    return Config(model=Model(hf=Path("none")), data=Data(train=Path("none")), rollout=rollout, **(CASES | EMPTY)[case])


def make_groups() -> tuple[Group, ...]:
    """Two domains, groups of 2 and 3, lengths from 1 to the limit, some truncated, and a greedy response to each prompt."""
    draw = random.Random(7)

    def response(prompt: Prompt, sample: int) -> Response:
        length = draw.randint(1, MAX_TOKENS)
        reason = "length" if length == MAX_TOKENS or draw.random() < 0.2 else "stop"
        logp = tuple(-draw.random() for _ in range(length))
        return Response(prompt.uid, sample, (5,) * length, logp, "", reason, 0, score=draw.choice([0.0, 0.5, 1.0, 7.0]))

    prompts = [Prompt(f"p{n}", (1,) * (n % 3 + 1), "", "", domain="ab"[n % 2]) for n in range(7)]
    return tuple(Group(p, tuple(response(p, n) for n in range(2 + p.domain.count("b"))), response(p, 9)) for p in prompts)


def all_truncated(group: Group) -> Group:
    return replace(group, responses=tuple(replace(response, finish_reason="length") for response in group.responses))


def with_models(batch: PackedBatch) -> PackedBatch:
    """Log-probabilities and values that depend on the token's own numbers alone, hence not on how it is packed."""
    old_T = torch.where(batch.mask_T, batch.logp_rollout_T * 1.6, torch.nan)
    ref_T = torch.where(batch.mask_T, batch.logp_rollout_T.sin(), torch.nan)
    return batch.with_logp(old=old_T, ref=ref_T, value=batch.logp_rollout_T.cos())


def _assign(case: str, groups: Groups, dp_rank: int, dp_size: int) -> Credited:
    cfg, groups_P = make_config(case), make_groups()
    if case in EMPTY:
        groups_P = tuple(all_truncated(group) for group in groups_P)
    batch = with_models(pack_groups(groups_P, dp_rank, dp_size))
    return Credit(cfg, groups, deadline_s=20).assign(batch, groups_P, cfg.algo)


def _all(rank: int) -> dict[str, tuple[Credited, Credited, Credited]]:
    """Split over all ranks; everything on this one; and split over two data-parallel ranks of two context-parallel ones each."""
    from torch import distributed as dist

    everyone = dist.group.WORLD
    alone = [dist.new_group([one]) for one in range(RANKS)][rank]
    # Context-parallel peers are neighbours, as in Megatron; they hold equal, whole responses.
    dp = [dist.new_group([cp, 2 + cp]) for cp in range(2)][rank % 2]
    peers = [dist.new_group([2 * one, 2 * one + 1]) for one in range(2)][rank // 2]

    def groups(world: Any, place: int) -> Groups:
        coords = Coords(tp=0, cp=0, dp=place, pp=0)
        return Groups(coords, world, world, dp=world, dp_cp=world, tp=alone, cp=alone, pp=alone, model=alone)

    coords = Coords(tp=0, cp=rank % 2, dp=rank // 2, pp=0)
    cut = Groups(coords, everyone, everyone, dp=dp, dp_cp=everyone, tp=alone, cp=peers, pp=alone, model=peers)
    layouts = (groups(everyone, rank), rank, RANKS), (groups(alone, 0), 0, 1), (cut, rank // 2, 2)
    return {case: tuple(_assign(case, *layout) for layout in layouts) for case in CASES | EMPTY}


@pytest.fixture(scope="module")
def answers() -> Answers:
    return run_ranks(RANKS, _all, timeout_s=120)


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("case", CASES | EMPTY)
def test_a_split_batch_gets_the_bits_of_the_whole(case: str, cp: int, answers: Answers) -> None:
    owners = assign_ranks(make_groups(), RANKS // cp)
    for rank in range(RANKS):
        _, whole, _ = answers[rank][case]
        share = answers[rank][case][{1: 0, 2: 2}[cp]]
        index = token_index(whole.batch.cu_len_S1, [number for number, owner in enumerate(owners) if owner == rank // cp])
        assert torch.equal(share.adv_T, whole.adv_T[index])
        assert torch.equal(share.batch.mask_T, whole.batch.mask_T[index])
        assert (share.return_T is None) == (whole.return_T is None)
        assert share.return_T is None or torch.equal(share.return_T, whole.return_T[index])
        if share.batch.weight_T is not None:
            assert torch.equal(share.batch.weight_T, whole.batch.weight_T[index])
        assert share.metrics == pytest.approx(whole.metrics, rel=1e-12, nan_ok=False)
        assert share.metrics == answers[0][case][{1: 0, 2: 2}[cp]].metrics


def test_the_cases_do_what_they_are_named_after(answers: Answers) -> None:
    whole = {case: found[1] for case, found in answers[0].items()}
    plain = with_models(pack_groups(make_groups(), 0, 1)).mask_T
    assert whole["baseline without truncated"].batch.mask_T.sum() < plain.sum()
    assert whole["baseline, mis"].batch.mask_T.sum() < plain.sum()
    assert 0 < whole["baseline, mis"].metrics["correction/kept_frac"] < 1
    assert torch.equal(whole["dr_grpo, tis"].batch.mask_T, plain)
    assert whole["dr_grpo, tis"].batch.weight_T.max() <= 0.75 + 1e-6
    assert whole["gae"].return_T is not None
    assert len({case for case, one in whole.items() if one.metrics["adv/abs_max"] > 0}) == len(CASES)


NORMALIZED = ("baseline, tis normalized, geometric rejection", "baseline, icepop normalized")


@pytest.mark.parametrize("case", NORMALIZED)
def test_normalized_weights_have_mean_1_over_what_the_loss_sees_of_the_global_batch(case: str, answers: Answers) -> None:
    """On every layout; some tokens are rejected, and no rank's own share has that mean."""
    plain = with_models(pack_groups(make_groups(), 0, 1)).mask_T
    for layout in range(3):
        shares = [answers[rank][case][layout] for rank in ((0,), (0, 1, 2, 3), (0, 2))[(1, 0, 2)[layout]]]
        weights = torch.cat([share.batch.weight_T[share.batch.mask_T] for share in shares])
        kept = weights[weights > 0]
        assert 0 < len(kept) < plain.sum()
        assert kept.double().mean().item() == pytest.approx(1.0, abs=1e-6)
        assert shares[0].metrics["correction/normalizer"] == answers[0][case][1].metrics["correction/normalizer"]  # to the bit
        if len(shares) > 1:
            means = [share.batch.weight_T[share.batch.weight_T > 0].mean().item() for share in shares]
            assert any(abs(mean - 1) > 1e-3 for mean in means)


def test_without_a_token_left_nothing_is_nan(answers: Answers) -> None:
    for rank in range(RANKS):
        for share in answers[rank]["baseline, nothing is left"]:
            assert not share.batch.mask_T.any()
            assert not share.batch.weight_T.any()
            assert share.adv_T.isfinite().all()
            assert share.metrics["correction/normalizer"] == 1.0
            assert share.metrics["correction/kept_frac"] == 0.0


@pytest.mark.parametrize("case", EMPTY)
def test_a_step_of_truncated_responses_alone_has_no_advantage_and_no_token_to_learn_from(case: str, answers: Answers) -> None:
    for rank in range(RANKS):
        for share in answers[rank][case]:
            assert not share.batch.mask_T.any()
            assert not share.adv_T.any()
            assert share.metrics["adv/population_size"] == 0.0
            assert share.metrics["adv/is_degenerate"] == 1.0
            assert share.metrics["adv/zero_variance_frac"] > 0  # the scores are known all the same


def test_the_critics_own_lambda_moves_its_targets_and_not_the_policys_advantages(answers: Answers) -> None:
    own = answers[0]["gae, the critic's own lambda"][1]
    batch = with_models(pack_groups(make_groups(), 0, 1))
    algo = make_config("gae, the critic's own lambda").algo
    assert torch.equal(own.return_T, critic_returns(batch, algo, 0.5))
    assert not torch.allclose(own.return_T, critic_returns(batch, algo))


def test_rejected_tokens_stay_in_the_statistics_and_leave_the_loss(answers: Answers) -> None:
    rejected = answers[0]["baseline, mis"][1]
    plain = with_models(pack_groups(make_groups(), 0, 1))
    assert rejected.metrics["adv/population_size"] == float(plain.mask_T.sum())
    assert (rejected.adv_T[plain.mask_T & ~rejected.batch.mask_T] != 0).any()


def _spoiled(rank: int) -> str:
    from torch import distributed as dist

    world = dist.group.WORLD
    alone = [dist.new_group([one]) for one in range(2)][rank]
    groups = Groups(Coords(0, 0, rank, 0), world, world, dp=world, dp_cp=world, tp=alone, cp=alone, pp=alone, model=alone)
    cfg, groups_P = make_config("remax"), make_groups()
    batch = with_models(pack_groups(groups_P, rank, 2))
    if rank == 1:
        batch = replace(batch, logp_old_T=torch.where(batch.mask_T, torch.inf, batch.logp_old_T))
    try:
        Credit(cfg, groups, deadline_s=20).assign(batch, groups_P, cfg.algo)
    except NumericsError as error:
        return str(error)
    return ""


def test_a_value_that_is_not_finite_on_one_rank_is_the_same_error_on_all() -> None:
    mine, other = run_ranks(2, _spoiled, timeout_s=60)
    assert mine == other
    assert "rank 1" in mine
