"""Train against roll-out log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rpp.algo.mismatch import mismatch, summarise


def test_two_tokens_by_hand() -> None:
    """d = log 2 and 0, w = 2 and 1: mean |d| = log 2 / 2, k3 = (2 - 1 - log 2 + 0) / 2, ESS = 3^2 / (2 * 5) = 0.9."""
    old_T = torch.tensor([-1.0, -2.0, math.nan], dtype=torch.float64)
    rollout_T = torch.tensor([-1.0 - math.log(2), -2.0, 7.0], dtype=torch.float64)
    seen = summarise(*mismatch(old_T, rollout_T, torch.tensor([True, True, False])))
    assert seen.num_tokens == 2
    assert seen.mean_abs == pytest.approx(math.log(2) / 2, rel=1e-14)
    assert seen.max_abs == pytest.approx(math.log(2), rel=1e-14)
    assert seen.k3 == pytest.approx((1 - math.log(2)) / 2, rel=1e-13)
    assert seen.ess_frac == pytest.approx(0.9, rel=1e-14)


def test_shares_of_ranks_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    old_T, rollout_T = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    mask_T = torch.rand(20, generator=generator) < 0.7
    whole = summarise(*mismatch(old_T, rollout_T, mask_T))
    shares = [mismatch(old_T[a:b], rollout_T[a:b], mask_T[a:b]) for a, b in ((0, 6), (6, 6), (6, 20))]
    together = summarise(torch.stack([s for s, _ in shares]).sum(0), torch.stack([m for _, m in shares]).max())
    for name in ("num_tokens", "mean_abs", "max_abs", "k3", "ess_frac"):
        assert getattr(together, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_equal_engines_have_no_mismatch_and_all_samples_count() -> None:
    logp_T = torch.full((5,), -0.3)
    seen = summarise(*mismatch(logp_T, logp_T, torch.ones(5, dtype=torch.bool)))
    assert (seen.mean_abs, seen.max_abs, seen.k3, seen.ess_frac) == (0.0, 0.0, 0.0, 1.0)


def test_a_wild_difference_is_reported_and_the_weights_stay_finite() -> None:
    seen = summarise(*mismatch(torch.tensor([0.0]), torch.tensor([-900.0]), torch.ones(1, dtype=torch.bool)))
    assert seen.max_abs == 900.0
    assert math.isfinite(seen.k3)


def test_no_token_at_all_is_no_mismatch() -> None:
    empty_T = torch.zeros(0)
    assert summarise(*mismatch(empty_T, empty_T, empty_T.bool())).ess_frac == 1.0
