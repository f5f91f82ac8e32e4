"""Models with experts and with latent attention compute, in every layout, what transformers and a textbook update compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rpp.data.packing import pack_groups
from tests.mcore import layouts, oracle, sparse, tiny
from tests.mcore.test_layouts import worst

CASES = [pytest.param(layout, kind, id=f"{kind}-{layout}") for layout, (_, kinds) in layouts.SPARSE_LAYOUTS.items() for kind in kinds]
ALONE = [case for case in CASES if "dp" not in layouts.SPARSE_LAYOUTS[case.values[0]][0]]
WHOLE = [case for case in ALONE if "cp" not in layouts.SPARSE_LAYOUTS[case.values[0]][0]]
BIAS = "e_score_correction_bias"


@dataclass
class Wanted:
    before: dict[str, Tensor]
    logits_TV: Tensor
    logp_T: Tensor
    updated: oracle.Updated


@cache
def wanted(kind: str, root: Path) -> Wanted:
    """The oracle's answers for the whole batch."""
    cfg = tiny.make_config(root / kind, algo=dict(minibatches=2))
    batch, adv_T = tiny.make_batch(tiny.make_groups(), num_minibatches=2)
    model = oracle.load(root / kind)
    with torch.no_grad():
        logits_TV = oracle.logits(model, batch)
        logp_T, _ = oracle.logp_and_entropy(model, batch, layouts.TEMPERATURE)
    updated = oracle.update(root / kind, batch, adv_T, cfg, tiny.surrogate, layouts.TEMPERATURE)
    before = sparse.as_in_files(dict(model.state_dict()), model.config.model_type)
    return Wanted(before, logits_TV, logp_T, updated)


@pytest.mark.parametrize(("layout", "kind"), WHOLE)
def test_logits_equal_transformers(layout: str, kind: str, sparse_root: Path) -> None:
    got = layouts.sparse_answers(layout, sparse_root)[kind].logits_TV
    torch.testing.assert_close(got, wanted(kind, sparse_root).logits_TV, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "kind"), ALONE)
def test_log_probabilities_equal_transformers_and_are_zero_off_the_mask(layout: str, kind: str, sparse_root: Path) -> None:
    got, want_T = layouts.sparse_answers(layout, sparse_root)[kind].logp_T, wanted(kind, sparse_root).logp_T
    torch.testing.assert_close(got, want_T, rtol=0, atol=1e-5)
    assert torch.equal(got == 0.0, want_T == 0.0)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_two_optimiser_steps_leave_the_gradients_and_weights_of_a_textbook_update(layout: str, kind: str, sparse_root: Path) -> None:
    got, want = layouts.sparse_answers(layout, sparse_root)[kind], wanted(kind, sparse_root)
    gradients = {name: gradient for name, gradient in got.gradients.items() if not name.endswith(BIAS)}
    weights = {name: weight for name, weight in got.weights.items() if not name.endswith(BIAS)}
    assert max(worst(gradients, want.updated.gradients).values()) < 1e-5
    assert max(worst(weights, want.updated.weights).values()) < 2e-6
    moved = min(float((want.updated.weights[name] - want.before[name]).abs().max()) for name in weights)
    assert moved > 1e-5, "a weight that does not move proves nothing"


@pytest.mark.parametrize(("layout", "kind"), [case for case in CASES if case.values[1] == "deepseek_v3"])
def test_the_biases_of_a_router_arrive_and_stay(layout: str, kind: str, sparse_root: Path) -> None:
    before = {name: tensor for name, tensor in wanted(kind, sparse_root).before.items() if name.endswith(BIAS)}
    after = layouts.sparse_answers(layout, sparse_root)[kind].weights
    assert len(before) == 3 and all(torch.equal(after[name], bias) and bias.dtype == torch.float32 for name, bias in before.items())


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_statistics_are_token_means_over_all_ranks(layout: str, kind: str, sparse_root: Path) -> None:
    answer, want = layouts.sparse_answers(layout, sparse_root)[kind], wanted(kind, sparse_root)
    assert answer.is_same_on_all_ranks
    assert answer.stats.num_tokens == int(pack_groups(tiny.make_groups(), 0, 1).mask_T.sum())
    assert answer.stats.loss == pytest.approx(want.updated.loss, abs=1e-6)
    assert answer.stats.grad_norm == pytest.approx(want.updated.grad_norm, rel=5e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_a_minibatch_without_a_token_is_left_out_by_every_stage_and_every_rank_of_the_experts(kind: str, sparse_root: Path) -> None:
    found = layouts.sparse_answers("pp2 vpp2 dp2, ep2", sparse_root)[kind].left_out
    assert all(found.values()), found
