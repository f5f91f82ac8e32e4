"""What the training loop relies on: supervised steps, the frozen reference, refusal of bad gradients, rates, precision."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algo.objective import policy_objective
from megatron_rpp.config.schema import Algo, Config
from megatron_rpp.errors import DeadlineError
from megatron_rpp.types import UpdateStats
from tests.dist.ranks import run_ranks
from tests.mcore import oracle, tiny

ALGO = dict(minibatches=2, kl_loss_coef=0.1, entropy_coef=0.02)


def _copies(policy) -> list[Tensor]:
    return [tensor.detach().clone() for _, _, tensor in policy.named_local()]


def _is_unchanged(policy, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, (_, _, b) in zip(before, policy.named_local(), strict=True))


def _everything(rank: int, root: Path) -> dict[str, Any]:
    """All that one process can show, in one spawn."""
    found: dict[str, Any] = {}
    cfg = tiny.make_config(root / "qwen3")
    with tiny.megatron(cfg) as groups:
        batch, adv_T = tiny.make_batch(tiny.make_groups())
        found["supervised"] = _supervise(cfg, groups, batch)
        found["objective"] = _real_objective(root, groups)
        found["frozen"] = _freeze(cfg, groups, batch, adv_T)
        found["not finite"] = _spoil(root, groups)
        found["rates"] = _rates(root, groups, batch)
        found["bfloat16"] = {is_distributed: _bfloat16(root, groups, batch, adv_T, is_distributed) for is_distributed in (True, False)}
    return found


def _supervise(cfg: Config, groups, batch) -> tuple[list[float], list[float]]:
    policy = tiny.open_policy(cfg, groups)
    nll, losses = [], []
    for _ in range(4):
        nll.append(float(-policy.logprobs(batch).sum() / batch.mask_T.sum()))
        losses.append(policy.supervise(batch).loss)
    return nll, losses


def _real_objective(root: Path, groups) -> tuple[UpdateStats, dict[str, Tensor]]:
    cfg = tiny.make_config(root / "qwen2", algo=ALGO)
    policy = tiny.open_policy(cfg, groups)
    batch, adv_T = _batch_with_reference()
    return policy.update(batch, adv_T, cfg.algo, temperature=0.9), tiny.weights_as_hf(policy, cfg)


def _batch_with_reference():
    batch, adv_T = tiny.make_batch(tiny.make_groups(), num_minibatches=2)
    return batch.with_logp(old=batch.logp_rollout_T, ref=batch.logp_rollout_T * 1.1), adv_T


def _freeze(cfg: Config, groups, batch, adv_T) -> dict[str, bool]:
    policy, ref = tiny.open_policy(cfg, groups), tiny.open_policy(cfg, groups, trainable=False)
    first_T = ref.logprobs(batch)
    same_at_start = torch.equal(first_T, policy.logprobs(batch))
    policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)
    return {
        "equals the policy at the start": same_at_start,
        "stays": torch.equal(first_T, ref.logprobs(batch)),
        "policy moves": not torch.equal(first_T, policy.logprobs(batch)),
        "has nothing to train": ref.optimizer is None and not any(tensor.requires_grad for _, _, tensor in ref.named_local()),
    }


def _spoil(root: Path, groups) -> dict[str, Any]:
    """Three minibatches, the second of which has advantages that are not numbers; and a twin that stops there by other means."""
    cfg = tiny.make_config(root / "qwen3", algo=dict(minibatches=3))
    batch, adv_T = tiny.make_batch(tiny.make_groups(num_prompts=3), num_minibatches=3)
    group_T = torch.repeat_interleave(batch.group_S, torch.diff(batch.cu_len_S1))
    policy = tiny.open_policy(cfg, groups)
    stats = policy.update(batch, torch.where(group_T == 1, torch.nan, adv_T), cfg.algo, objective=tiny.surrogate)
    weights = _copies(policy)
    twin = tiny.open_policy(cfg, groups)
    twin.update(batch, adv_T, cfg.algo, objective=_infinite_but_for_group_0)
    return {
        "stats": stats,
        "is finite": all(bool(torch.isfinite(tensor).all()) for tensor in weights),
        "as after one": _is_unchanged(twin, weights),
    }


def _infinite_but_for_group_0(logp_new_T: Tensor, entropy_T: Tensor, batch, adv_T: Tensor):
    loss, count, values = tiny.surrogate(logp_new_T, entropy_T, batch, adv_T)
    return (loss if (batch.group_S == 0).all() else loss * torch.inf), count, values


def _rates(root: Path, groups, batch) -> dict[str, list[float]]:
    found = {}
    for schedule in ("constant", "linear", "cosine"):
        cfg = tiny.make_config(root / "qwen3", optim=dict(lr=1.0e-3, min_lr=1.0e-4, warmup_steps=2, schedule=schedule))
        policy = tiny.open_policy(cfg, groups, total_steps=5)
        found[schedule] = [policy.supervise(batch).values["lr"] for _ in range(6)]
    return found


def _bfloat16(root: Path, groups, batch, adv_T, is_distributed: bool) -> dict[str, Any]:
    optim = dict(distributed=is_distributed, lr=1e-9)
    cfg = tiny.make_config(root / "qwen3", optim=optim)
    cfg = replace(cfg, model=replace(cfg.model, dtype="bfloat16"))
    policy = tiny.open_policy(cfg, groups)
    before = _copies(policy)
    logp_T = policy.logprobs(batch)
    stats = policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)
    return {"logp": logp_T, "stats": stats, "weights stay": _is_unchanged(policy, before), "dtype": policy.dtype}


@pytest.fixture(scope="module")
def shown(hf_root: Path) -> dict[str, Any]:
    return run_ranks(1, _everything, hf_root, init=False, timeout_s=250.0)[0]


def test_supervised_steps_minimise_the_mean_negative_log_likelihood(shown) -> None:
    nll, losses = shown["supervised"]
    assert losses == pytest.approx(nll, abs=1e-5)
    assert all(after < before - 0.01 for before, after in zip(losses, losses[1:], strict=False)), losses


def test_the_default_objective_is_the_policy_objective_with_its_metrics_as_token_means(shown, hf_root: Path) -> None:
    stats, weights = shown["objective"]
    cfg = tiny.make_config(hf_root / "qwen2", algo=ALGO)
    batch, adv_T = _batch_with_reference()
    measured: list[dict[str, Tensor]] = []

    def recorded(*args):
        loss, count, values = policy_objective(*args, Algo(**ALGO))
        measured.append({"num_tokens": count, **values})
        return loss, count, values

    want = oracle.update(hf_root / "qwen2", batch, adv_T, cfg, recorded, 0.9)
    assert stats.loss == pytest.approx(want.loss, abs=1e-6)
    assert max(float((weights[name] - want.weights[name]).abs().max()) for name in want.weights) < 2e-6
    tokens = sum(int(row["num_tokens"]) for row in measured)
    for name in ("policy_loss", "kl_loss"):
        assert getattr(stats, name) == pytest.approx(sum(float(row[name]) for row in measured) / tokens, abs=1e-6)
    for name in ("entropy", "kl_k1", "clip_frac_low", "ratio"):
        assert stats.values[name] == pytest.approx(sum(float(row[name]) for row in measured) / tokens, abs=2e-6), name
    assert stats.values["ratio_max"] == pytest.approx(max(float(row["ratio_max"]) for row in measured), rel=1e-5)


def test_the_frozen_reference_is_the_policy_at_the_start_and_stays(shown) -> None:
    assert all(shown["frozen"].values()), shown["frozen"]


def test_a_gradient_that_is_not_finite_moves_nothing_and_ends_the_update(shown) -> None:
    found = shown["not finite"]
    assert not found["stats"].is_finite and found["stats"].num_minibatches == 2
    assert found["is finite"] and found["as after one"]


def test_the_learning_rate_follows_the_schedule_from_the_first_step(shown) -> None:
    warm = [0.5e-3, 1.0e-3]
    assert shown["rates"]["constant"] == pytest.approx([*warm, 1e-3, 1e-3, 1e-3, 1e-3])
    assert shown["rates"]["linear"] == pytest.approx([*warm, 0.7e-3, 0.4e-3, 0.1e-3, 0.1e-3])
    assert shown["rates"]["cosine"] == pytest.approx([*warm, 0.775e-3, 0.325e-3, 0.1e-3, 0.1e-3])


@pytest.mark.parametrize("is_distributed", [True, False])
def test_bfloat16_trains_from_float32_copies_of_the_loaded_weights(is_distributed: bool, shown, hf_root: Path) -> None:
    found = shown["bfloat16"][is_distributed]
    batch, _ = tiny.make_batch(tiny.make_groups())
    with torch.no_grad():
        want_T, _ = oracle.logp_and_entropy(oracle.load(hf_root / "qwen3"), batch, 1.0)
    assert found["dtype"] is torch.bfloat16 and found["logp"].dtype is torch.float32
    assert float((found["logp"] - want_T).abs().max()) < 0.15
    assert found["stats"].is_finite and found["weights stay"], (
        "a tiny step must not replace the weights by what the optimizer held before the load"
    )


def _abandon(rank: int, hf: Path) -> str:
    """Rank 1 leaves while rank 0 waits for it inside Megatron."""
    cfg = tiny.make_config(hf, tp=2)
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        if rank == 1:
            return ""
        batch, adv_T = tiny.make_batch(tiny.make_groups())
        with pytest.raises(DeadlineError) as error:
            policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)
        return str(error.value)


def test_a_peer_that_left_ends_the_step_with_its_name(hf_root: Path) -> None:
    said = run_ranks(2, _abandon, hf_root / "qwen3", init=False, timeout_s=150.0)[0]
    assert "wait 'optimiser step'" in said and "rank 0" in said


# Ranks of a busy host start seconds apart, and meet within the deadline too.
HANG_DEADLINE_S = 8.0
# The work before the wait. With the deadline it stays below a minute, the unit that Megatron wants its limit in.
HANG_MARGIN_S = 30.0


def _hang(rank: int, hf: Path, sizes: dict[str, int], scratch: Path) -> dict[str, tuple[float, str]]:
    """Rank 1 stays alive and connected and does nothing, while rank 0 waits for it in a step and then in a save."""
    cfg = tiny.make_config(hf, **sizes)
    cfg = replace(cfg, run=replace(cfg.run, deadline_s=HANG_DEADLINE_S))
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        batch, adv_T = tiny.make_batch(tiny.make_groups(), groups.coords.dp, groups.dp_size)
        if rank == 1:
            while not (scratch / "done").exists():
                time.sleep(0.1)
            return {}
        said = {}
        for name, wait in {
            "update": lambda: policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate),
            "save": lambda: policy.save(scratch / "checkpoint"),
        }.items():
            start = time.monotonic()
            with pytest.raises(DeadlineError) as error:
                wait()
            said[name] = (time.monotonic() - start, str(error.value))
        (scratch / "done").touch()
        return said


@pytest.fixture(scope="module")
def hung(hf_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[float, str]]]:
    """What rank 0 said in each layout. All at once, for they do nothing but wait."""
    with ThreadPoolExecutor() as pool:
        waiting = {
            axis: pool.submit(run_ranks, 2, _hang, hf_root / "qwen3", {axis: 2}, tmp_path_factory.mktemp(axis), init=False, timeout_s=150.0)
            for axis in ("tp", "pp", "dp")
        }
        return {axis: future.result()[0] for axis, future in waiting.items()}


@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
def test_a_peer_that_hangs_ends_the_wait_by_name_at_the_deadline(axis: str, hung: dict[str, dict[str, tuple[float, str]]]) -> None:
    said = hung[axis]
    # Ranks of other data meet before the step, to count what each minibatch has.
    update = "tokens of each minibatch" if axis == "dp" else "optimiser step"
    for wait, name in {"update": update, "save": "checkpoint directory"}.items():
        elapsed_s, message = said[wait]
        assert f"wait '{name}': rank 0 waited longer than {HANG_DEADLINE_S:g} s" in message
        assert HANG_DEADLINE_S - 0.5 < elapsed_s < HANG_DEADLINE_S + HANG_MARGIN_S
