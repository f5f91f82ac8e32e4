"""Every layout of every family computes what transformers and a textbook update compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rpp.algo.objective import policy_objective
from megatron_rpp.data.packing import pack_groups
from tests.dist.ranks import run_ranks
from tests.mcore import layouts, oracle, tiny

CASES = [pytest.param(layout, kind, id=f"{kind}-{layout}") for layout in layouts.LAYOUTS for kind in tiny.KINDS]


@dataclass
class Wanted:
    logits_TV: Tensor
    logp_T: Tensor
    entropy_T: Tensor
    updated: oracle.Updated


@cache
def wanted(kind: str, root: Path) -> Wanted:
    """The oracle's answers for the whole batch, dp 1."""
    cfg = tiny.make_config(root / kind, algo=dict(minibatches=2))
    batch, adv_T = tiny.make_batch(tiny.make_groups(), num_minibatches=2)
    model = oracle.load(root / kind)
    with torch.no_grad():
        logits_TV = oracle.logits(model, batch)
        logp_T, entropy_T = oracle.logp_and_entropy(model, batch, layouts.TEMPERATURE)
    updated = oracle.update(root / kind, batch, adv_T, cfg, tiny.surrogate, layouts.TEMPERATURE)
    return Wanted(logits_TV, logp_T, entropy_T, updated)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, in units of its largest entry."""
    assert got.keys() == want.keys()
    return {name: float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want}


@pytest.mark.parametrize(("layout", "kind"), [case for case in CASES if not {"dp2", "cp2"} & set(case.values[0].split())])
def test_logits_equal_transformers(layout: str, kind: str, hf_root: Path) -> None:
    got = layouts.answers(layout, hf_root)[kind].logits_TV
    torch.testing.assert_close(got, wanted(kind, hf_root).logits_TV, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_log_probabilities_equal_transformers_and_are_zero_off_the_mask(layout: str, kind: str, hf_root: Path) -> None:
    got, want_T = layouts.answers(layout, hf_root)[kind].logp_T, wanted(kind, hf_root).logp_T
    if "dp2" in layout:
        want_T = _share(want_T, tiny.make_groups())
    torch.testing.assert_close(got, want_T, rtol=0, atol=1e-5)
    assert torch.equal(got == 0.0, want_T == 0.0)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_two_optimiser_steps_leave_the_gradients_and_weights_of_a_textbook_update(layout: str, kind: str, hf_root: Path) -> None:
    got, want = layouts.answers(layout, hf_root)[kind], wanted(kind, hf_root).updated
    assert max(worst(got.gradients, want.gradients).values()) < 1e-5
    assert max(worst(got.weights, want.weights).values()) < 2e-6
    before = oracle.load(hf_root / kind).state_dict()
    assert min(float((want.weights[name] - before[name]).abs().max()) for name in want.weights) > 1e-4, (
        "a weight that does not move proves nothing"
    )


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_statistics_are_token_means_over_all_ranks(layout: str, kind: str, hf_root: Path) -> None:
    answer, want = layouts.answers(layout, hf_root)[kind], wanted(kind, hf_root)
    assert answer.is_same_on_all_ranks
    stats = answer.stats
    assert stats.num_tokens == int(pack_groups(tiny.make_groups(), 0, 1).mask_T.sum()) and stats.num_minibatches == 2
    assert stats.loss == pytest.approx(want.updated.loss, abs=1e-6)
    assert stats.grad_norm == pytest.approx(want.updated.grad_norm, rel=2e-6)
    assert stats.is_finite and stats.values["lr"] == 1e-2


@cache
def wanted_per_response(root: Path) -> oracle.Updated:
    cfg = tiny.make_config(root / "qwen3", algo=layouts.PER_RESPONSE)
    batch, adv_T = tiny.make_batch(tiny.make_groups(), num_minibatches=2)
    return oracle.update(root / "qwen3", batch, adv_T, cfg, partial(policy_objective, algo=cfg.algo), layouts.TEMPERATURE)


@pytest.mark.parametrize("layout", layouts.PER_RESPONSE_LAYOUTS)
def test_a_loss_over_responses_gives_the_textbooks_update(layout: str, hf_root: Path) -> None:
    """GSPO, mean over responses of their token means: Megatron divides by responses, which ranks and microbatches share and cp cuts."""
    got, want = layouts.answers(layout, hf_root)["per response"], wanted_per_response(hf_root)
    assert max(worst(got.gradients, want.gradients).values()) < 1e-5
    assert max(worst(got.weights, want.weights).values()) < 2e-6
    assert (got.stats.loss, got.stats.grad_norm) == (pytest.approx(want.loss, abs=1e-6), pytest.approx(want.grad_norm, rel=2e-6))
    assert 0.05 < got.stats.values["clip_frac_low"] + got.stats.values["clip_frac_high"] < 0.95


def _share(values_T: Tensor, groups: tuple) -> Tensor:
    """Rank 0's part of the whole batch's values, found by each sequence's group and place in it."""
    whole, part = pack_groups(groups, 0, 1, num_minibatches=2), pack_groups(groups, 0, 2, num_minibatches=2)
    spans = {tuple(whole.tokens_T[a:b].tolist()): values_T[a:b] for a, b in _bounds(whole)}
    return torch.cat([spans[tuple(part.tokens_T[a:b].tolist())] for a, b in _bounds(part)])


def _bounds(batch) -> list[tuple[int, int]]:
    cu_len = batch.cu_len_S1.tolist()
    return list(zip(cu_len, cu_len[1:], strict=False))


def test_a_rank_without_sequences_or_tokens_takes_part_where_another_has_some_and_else_nobody_steps(hf_root: Path) -> None:
    first_rank, second_rank = run_ranks(2, layouts.empty_rank, hf_root, init=False, timeout_s=200.0)
    assert first_rank["tokens"] > 0 and second_rank["tokens"] == 0 and second_rank["logp"] == 0
    assert first_rank["stats"] == second_rank["stats"]
    groups = tiny.make_groups(num_prompts=1, samples=1, seed=5)
    batch, adv_T = tiny.make_batch(groups)
    cfg = tiny.make_config(hf_root / "qwen3")
    once = oracle.update(hf_root / "qwen3", batch, adv_T, cfg, tiny.surrogate, 1.0)
    stats = first_rank["stats"][0]
    assert (stats.num_tokens, stats.loss) == (int(batch.mask_T.sum()), pytest.approx(once.loss, abs=1e-6))
    assert stats.grad_norm == pytest.approx(once.grad_norm, rel=2e-6)
    assert all(first_rank["left out"].values()), first_rank["left out"]


def test_micro_batch_size_and_packing_order_change_nothing_but_rounding(hf_root: Path) -> None:
    found = run_ranks(1, layouts.other_cuts, hf_root, init=False, timeout_s=200.0)[0]
    batch, adv_T = tiny.make_batch(tiny.make_groups())
    want = oracle.update(hf_root / "qwen3", batch, adv_T, tiny.make_config(hf_root / "qwen3"), tiny.surrogate, 1.0)
    for tokens, (stats, gradients) in found.items():
        assert max(worst(gradients, want.gradients).values()) < 1e-5, tokens
        assert stats.loss == pytest.approx(want.loss, abs=1e-6), tokens
