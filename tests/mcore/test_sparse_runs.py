"""Experts in a running policy: weights there and back, checkpoints between layouts, ranks with unequal work, bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.types import UpdateStats
from tests.dist.ranks import run_ranks
from tests.mcore import oracle, sparse, tiny
from tests.mcore.test_layouts import worst
from tests.mcore.test_sparse import BIAS
from tests.mcore.test_weights_roundtrip import read_all

TIMEOUT_S = 200.0


def _there_and_back(rank: int, root: Path, sizes: dict[str, int]) -> dict[str, dict[str, Tensor]]:
    """What a fresh policy of each kind gives back of its files."""
    with tiny.megatron(tiny.make_config(root / "mixtral", **sizes)) as groups:
        found = {}
        for kind in sparse.MODELS:
            cfg = tiny.make_config(root / kind, **sizes)
            found[kind] = tiny.weights_as_hf(tiny.open_policy(cfg, groups, trainable=False), cfg)
        return found


def test_every_family_goes_there_and_back_bit_for_bit(sparse_root: Path) -> None:
    found = run_ranks(4, _there_and_back, sparse_root, dict(tp=2, pp=2, ep=2), init=False, timeout_s=TIMEOUT_S)[0]
    for kind, tensors in found.items():
        files = read_all(sparse_root / kind)
        assert tensors.keys() == files.keys(), kind
        assert all(torch.equal(tensors[name], tensor) for name, tensor in files.items()), kind


def _train(policy, cfg, groups, steps: range) -> list[UpdateStats]:
    found = []
    for step in steps:
        batch, adv_T = tiny.make_batch(tiny.make_groups(seed=step), groups.coords.dp, groups.dp_size)
        found.append(policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate))
    return found


def _run(rank: int, hf: Path, sizes: dict[str, Any], load: Path | None, save: Path | None) -> dict[str, Any]:
    """Steps 0 and 1 or a load; a save; steps 2 and 3. The optimiser's state is sharded. The biases of the routers move."""
    cfg = tiny.make_config(hf, optim=dict(schedule="linear", warmup_steps=1), megatron=dict(moe_router_bias_update_rate=0.01), **sizes)
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        if load is None:
            _train(policy, cfg, groups, range(2))
        else:
            policy.load(load)
        if save is not None:
            policy.save(save)
        at_save = tiny.weights_as_hf(policy, cfg)
        return {"at save": at_save, "stats": _train(policy, cfg, groups, range(2, 4)), "weights": tiny.weights_as_hf(policy, cfg)}


@pytest.fixture(scope="module")
def saved(sparse_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of tp 2, ep 2 and what the run that wrote it did next."""
    directory = tmp_path_factory.mktemp("sparse-checkpoint") / "policy"
    hf, sizes = sparse_root / "deepseek_v3", dict(tp=2, ep=2)
    return directory, run_ranks(2, _run, hf, sizes, None, directory, init=False, timeout_s=TIMEOUT_S)[0]


@pytest.mark.parametrize("sizes", [dict(tp=2, ep=2), {}, dict(dp=2, ep=2)], ids=["the same", "tp1 ep1", "dp2 ep2"])
def test_a_checkpoint_continues_in_every_layout_of_the_experts(sizes: dict[str, int], saved, sparse_root: Path) -> None:
    directory, went_on = saved
    world = sizes.get("tp", 1) * sizes.get("dp", 1)
    resumed = run_ranks(world, _run, sparse_root / "deepseek_v3", sizes, directory, None, init=False, timeout_s=TIMEOUT_S)[0]
    assert all(torch.equal(resumed["at save"][name], weight) for name, weight in went_on["at save"].items())
    is_same = sizes == dict(tp=2, ep=2)
    for before, after in zip(went_on["stats"], resumed["stats"], strict=True):
        assert after.loss == pytest.approx(before.loss, abs=0 if is_same else 1e-6)
        assert after.grad_norm == pytest.approx(before.grad_norm, rel=0 if is_same else 1e-5)
    for name, weight in went_on["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=0 if is_same else 2e-6)


def test_the_biases_of_the_routers_move_only_when_asked(saved, sparse_root: Path) -> None:
    before = {name: tensor for name, tensor in read_all(sparse_root / "deepseek_v3").items() if name.endswith(BIAS)}
    steps = [((saved[1]["at save"][name] - bias) / 0.01).round() for name, bias in before.items()]
    assert all(0 < step.abs().max() <= 2 for step in steps), "two updates of one rate each, up or down"


def _unequal(rank: int, root: Path, kind: str) -> dict[str, Any]:
    """dp 2 with one response on rank 0 and two, each a micro-batch of its own, on rank 1; experts over both."""
    cfg = tiny.make_config(root / kind, dp=2, ep=2, optim=dict(microbatch_tokens=1))
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        batch, adv_T = tiny.make_batch(tiny.make_groups(num_prompts=1, samples=3, seed=5), groups.coords.dp, 2)
        counts = len(policy._packing.microbatches(batch, 1.0)), batch.num_sequences
        logp_T = policy.logprobs(batch)
        stats = policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)
        return {"counts": counts, "logp": logp_T.numel(), "stats": stats, "weights": tiny.weights_as_hf(policy, cfg)}


def test_ranks_with_unequal_work_exchange_tokens_all_the_same(sparse_root: Path) -> None:
    """Every micro-batch exchanges tokens over dp, and the optimiser's state is sharded over it."""
    first, second = run_ranks(2, _unequal, sparse_root, "qwen3_moe", init=False, timeout_s=TIMEOUT_S)
    assert first["counts"] == (2, 1) and second["counts"] == (2, 2)
    batch, adv_T = tiny.make_batch(tiny.make_groups(num_prompts=1, samples=3, seed=5))
    want = oracle.update(sparse_root / "qwen3_moe", batch, adv_T, tiny.make_config(sparse_root / "qwen3_moe"), tiny.surrogate, 1.0)
    assert first["stats"].loss == pytest.approx(want.loss, abs=1e-6)
    assert first["stats"].grad_norm == pytest.approx(want.grad_norm, rel=5e-6)
    assert max(worst(first["weights"], want.weights).values()) < 2e-6


def _in_bfloat16(rank: int, root: Path) -> dict[str, Any]:
    cfg = tiny.make_config(root / "deepseek_v3", tp=2, ep=2)
    cfg = replace(cfg, model=replace(cfg.model, dtype="bfloat16"))
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        batch, adv_T = tiny.make_batch(tiny.make_groups())
        dtypes = {name.split(".")[-1]: tensor.dtype for name, _, tensor in policy.named_local() if ".router." in name}
        logp_T = policy.logprobs(batch)
        return {"dtypes": dtypes, "logp": logp_T, "stats": policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)}


def test_in_bfloat16_the_biases_of_the_routers_stay_float32(sparse_root: Path) -> None:
    found = run_ranks(2, _in_bfloat16, sparse_root, init=False, timeout_s=TIMEOUT_S)[0]
    assert found["dtypes"] == {"weight": torch.bfloat16, "expert_bias": torch.float32}
    batch, _ = tiny.make_batch(tiny.make_groups())
    with torch.no_grad():
        want_T, _ = oracle.logp_and_entropy(oracle.load(sparse_root / "deepseek_v3"), batch, 1.0)
    assert float((found["logp"] - want_T).abs().mean()) < 0.05 and found["stats"].is_finite
