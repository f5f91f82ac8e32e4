"""A run continues from its checkpoint as if it had never stopped, and a damaged checkpoint says so."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.errors import CheckpointError, StorageError
from megatron_rpp.types import UpdateStats
from tests.dist.ranks import run_ranks
from tests.mcore import tiny

TIMEOUT_S = 200.0


def _train(policy, cfg, groups, steps: range) -> list[UpdateStats]:
    found = []
    for step in steps:
        batch, adv_T = tiny.make_batch(tiny.make_groups(seed=step), groups.coords.dp, groups.dp_size)
        found.append(policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate))
    return found


def _run(rank: int, hf: Path, sizes: dict[str, Any], load: Path | None, save: Path | None) -> dict[str, Any]:
    """Steps 0 and 1 or a load; a save; steps 2 and 3. The rate decays, so that a lost schedule shows."""
    cfg = tiny.make_config(hf, optim=dict(schedule="linear", warmup_steps=1), **sizes)
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        if load is None:
            _train(policy, cfg, groups, range(2))
            random.random(), torch.rand(1)
        else:
            policy.load(load)
        if save is not None:
            policy.save(save)
        stats = _train(policy, cfg, groups, range(2, 4))
        draws = (random.random(), float(torch.rand(1)))
        return {"stats": stats, "weights": tiny.weights_as_hf(policy, cfg), "draws": draws}


@pytest.fixture(scope="module")
def saved(hf_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint of tp 2 and what the run that wrote it did next."""
    directory = tmp_path_factory.mktemp("checkpoint") / "policy"
    return directory, run_ranks(2, _run, hf_root / "qwen2", dict(tp=2), None, directory, init=False, timeout_s=TIMEOUT_S)


def test_the_same_layout_continues_bit_for_bit(saved, hf_root: Path) -> None:
    directory, went_on = saved
    resumed = run_ranks(2, _run, hf_root / "qwen2", dict(tp=2), directory, None, init=False, timeout_s=TIMEOUT_S)
    for before, after in zip(went_on, resumed, strict=True):
        assert after["stats"] == before["stats"]
        assert after["draws"] == before["draws"]
        for name, weight in before["weights"].items():
            assert torch.equal(after["weights"][name], weight), name
    assert went_on[0]["stats"][0].values["lr"] != went_on[0]["stats"][1].values["lr"]


@pytest.mark.parametrize("sizes", [dict(pp=2), dict(dp=2)], ids=["tp2 to pp2", "tp2 to dp2"])
def test_another_layout_continues_the_same_run(sizes: dict[str, int], saved, hf_root: Path) -> None:
    directory, went_on = saved
    resumed = run_ranks(2, _run, hf_root / "qwen2", sizes, directory, None, init=False, timeout_s=TIMEOUT_S)
    for before, after in zip(went_on[0]["stats"], resumed[0]["stats"], strict=True):
        assert after.loss == pytest.approx(before.loss, abs=1e-6)
        assert after.grad_norm == pytest.approx(before.grad_norm, rel=1e-5)
        assert after.values["lr"] == before.values["lr"]
    for name, weight in went_on[0]["weights"].items():
        torch.testing.assert_close(resumed[0]["weights"][name], weight, rtol=0, atol=2e-6)


def _saves_into_a_full_disk(rank: int, hf: Path, directory: Path) -> str:
    """Files of rank 1 may not grow: the same error of the kernel, without a disk to fill."""
    cfg = tiny.make_config(hf, tp=2)
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            policy.save(directory)
        except StorageError as error:
            return str(error)
    return ""


def test_a_disk_that_refuses_ends_the_save_on_every_rank_with_the_directory_and_its_space(hf_root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    first, second = run_ranks(2, _saves_into_a_full_disk, hf_root / "qwen2", directory, init=False, timeout_s=TIMEOUT_S)
    for message in (first, second):
        assert message.startswith(f"{directory}: the checkpoint cannot be written")
        assert " are free on " in message
    assert "rank 1: " in first


def _unsharded(rank: int, hf: Path, directory: Path) -> list[tuple[list[UpdateStats], dict[str, Any]]]:
    """A run that saves after two steps and goes on, and a second policy that starts from what it saved."""
    cfg = tiny.make_config(hf, optim=dict(distributed=False))
    found = []
    with tiny.megatron(cfg) as groups:
        for is_resumed in (False, True):
            policy = tiny.open_policy(cfg, groups)
            if is_resumed:
                policy.load(directory)
            else:
                _train(policy, cfg, groups, range(2))
                policy.save(directory)
            found.append((_train(policy, cfg, groups, range(2, 4)), tiny.weights_as_hf(policy, cfg)))
    return found


def test_an_unsharded_optimizer_continues_bit_for_bit(hf_root: Path, tmp_path: Path) -> None:
    (stats, weights), (resumed_stats, resumed_weights) = run_ranks(
        1, _unsharded, hf_root / "qwen3", tmp_path / "c", init=False, timeout_s=TIMEOUT_S
    )[0]
    assert resumed_stats == stats
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())


def _from_the_start(rank: int, hf: Path, dtype: str, is_distributed: bool, sizes: dict[str, int], directory: Path) -> dict[str, Any]:
    """Two steps of a run that never saves, of one that saves before them, and of one that starts from what that saved."""
    cfg = tiny.make_config(hf, optim=dict(distributed=is_distributed), **sizes)
    cfg = replace(cfg, model=replace(cfg.model, dtype=dtype))
    found = {}
    with tiny.megatron(cfg) as groups:
        policies = {name: tiny.open_policy(cfg, groups) for name in ("never saves", "saves", "resumes")}
        policies["saves"].save(directory)
        _train(policies["resumes"], cfg, groups, range(7, 8))  # what a load must wipe out: moments, steps, weights
        policies["resumes"].load(directory)
        for name, policy in policies.items():
            found[name] = (_train(policy, cfg, groups, range(2)), [tensor.detach() for _, _, tensor in policy.named_local()])
    return found


@pytest.mark.parametrize(
    ("dtype", "is_distributed", "sizes"),
    [("float32", False, dict(dp=2)), ("bfloat16", False, dict(tp=2)), ("float32", True, dict(dp=2))],
    ids=["float32", "bfloat16", "distributed"],
)
def test_a_checkpoint_from_before_the_first_step_starts_the_same_run(
    dtype: str, is_distributed: bool, sizes: dict[str, int], hf_root: Path, tmp_path: Path
) -> None:
    for found in run_ranks(
        2, _from_the_start, hf_root / "qwen3", dtype, is_distributed, sizes, tmp_path / "c", init=False, timeout_s=TIMEOUT_S
    ):
        stats, weights = found["never saves"]
        for name in ("saves", "resumes"):
            assert found[name][0] == stats, name
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[name][1], weights, strict=True)), name


def _refusals(rank: int, root: Path, directory: Path, scratch: Path) -> dict[str, str]:
    """What a load says about each kind of damage, and that it left the weights alone."""
    said = {}
    cfg = tiny.make_config(root / "qwen2")
    with tiny.megatron(cfg) as groups:

        def attempt(name: str, path: Path, policy) -> None:
            try:
                policy.load(path)
            except CheckpointError as error:
                said[name] = str(error)
            else:
                said[name] = "no error"

        policy = tiny.open_policy(cfg, groups)
        before = [tensor.clone() for _, _, tensor in policy.named_local()]
        attempt("absent", scratch / "nothing", policy)
        for name in ("no list", "gone", "short", "flipped"):
            attempt(name, _damaged(directory, scratch, name), policy)
            assert all(torch.equal(a, b) for a, (_, _, b) in zip(before, policy.named_local(), strict=True)), name
        other = tiny.make_config(root / "qwen3")
        attempt("other model", directory, tiny.open_policy(other, groups))
        plain = tiny.make_config(root / "qwen2", optim=dict(distributed=False))
        attempt("other optimizer", directory, tiny.open_policy(plain, groups))
    return said


def _damaged(directory: Path, scratch: Path, damage: str) -> Path:
    copy = scratch / damage.replace(" ", "-")
    shutil.copytree(directory, copy)
    largest = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "no list":
        (copy / "files.json").unlink()
    elif damage == "gone":
        largest.unlink()
    elif damage == "short":
        largest.write_bytes(largest.read_bytes()[:-1000])
    else:
        content = bytearray(largest.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4000] = bytes(4000)
        largest.write_bytes(content)
    return copy


def test_damage_and_foreign_checkpoints_are_refused_by_name(saved, hf_root: Path, tmp_path: Path) -> None:
    said = run_ranks(1, _refusals, hf_root, saved[0], tmp_path, init=False, timeout_s=TIMEOUT_S)[0]
    for name, words in {
        "absent": ["no such checkpoint", "nothing"],
        "no list": ["incomplete", "files.json"],
        "gone": ["missing", ".distcp"],
        "short": ["damaged", ".distcp", "bytes"],
        "flipped": ["damaged", ".distcp", "checksum"],
        "other model": ["model is another", "model_type"],
        "other optimizer": ["is_optimizer_distributed", "set optim.distributed"],
    }.items():
        assert all(word in said[name] for word in words), (name, said[name])
