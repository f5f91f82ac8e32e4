"""A run of the distributed optimizer over AdamW that is saved, loaded and continued is the uninterrupted run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rpp_patches import _core
from tests.dist.ranks import run_ranks
from tests.patches.behaviours import outcome
from tests.patches.tiny import Layout, build, start, step, stop

FAULTS = ("p050-optimizer-start", "p051-optimizer-keep-step", "p052-optimizer-own-step")
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


class Run:
    """A model with its optimizer on one layout, trained on the same batch at every step."""

    def __init__(self, layout: Layout) -> None:
        from megatron.core import parallel_state
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.layout, self.model = layout, build(layout, use_distributed_optimizer=True)
        settings = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True, clip_grad=1.0, weight_decay=0.1)
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.metadata = {**METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def train(self, steps: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each step."""
        out = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = float(step(self.layout, self.model))
            is_good, grad_norm, _ = self.optimizer.step()
            assert is_good
            out.append((loss, grad_norm))
        return out

    def state(self, *, is_loading: bool) -> dict[str, Any]:
        state = {"model": self.model.module.sharded_state_dict(metadata=self.metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=self.metadata)
        return state

    def save(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        for param in self.model.parameters():
            param.data.fill_(7.0)
        state = dist_checkpointing.load(self.state(is_loading=True), str(folder))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def continued(layout: Layout, folder: Path) -> list[tuple[float, float]]:
    """Two more steps after a load."""
    start(layout)
    run = Run(layout)
    run.load(folder)
    steps = run.train(2)
    stop()
    return steps


def save_and_continue(rank: int, root: str) -> dict[str, Any]:
    """Two ranks: the uninterrupted run, the loaded ones, and the loaded one without each patch."""
    torch.manual_seed(rank)
    layout, folder = Layout(), Path(root) / "checkpoint"
    start(layout)
    run = Run(layout)
    run.train(2)
    run.save(folder)
    out: dict[str, Any] = {"uninterrupted": run.train(2)}
    stop()
    out["dp2"] = continued(layout, folder)
    out["tp2"] = continued(Layout(tp=2), folder)
    out["pp2"] = continued(Layout(pp=2), folder)
    for name in FAULTS:
        entry = _core._ENTRIES["megatron_core"][name]
        entry.disable()
        steps: list[Any] = []
        error = outcome(lambda into=steps: into.extend(continued(layout, folder)))
        out[name] = error or steps
        if error:
            stop()
        entry.enable()
    return out


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        first, second = run_ranks(2, save_and_continue, root, timeout_s=240)
    assert first == second, "both ranks saw the same"
    return first


def test_a_run_loaded_on_the_same_layout_goes_on_with_the_same_bits(runs: dict[str, Any]) -> None:
    assert runs["dp2"] == runs["uninterrupted"]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_run_loaded_on_another_layout_goes_on_alike(runs: dict[str, Any], layout: str) -> None:
    for got, expected in zip(runs[layout], runs["uninterrupted"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def test_without_a_first_state_nothing_can_be_loaded(runs: dict[str, Any]) -> None:
    assert runs[FAULTS[0]].startswith("AssertionError")


def test_without_keeping_the_step_a_load_fails(runs: dict[str, Any]) -> None:
    assert runs[FAULTS[1]] == "KeyError: 'step'"


def test_with_a_shared_step_the_run_goes_wrong_without_a_word(runs: dict[str, Any]) -> None:
    (first, _), (second, _) = runs[FAULTS[2]]
    (expected_first, _), (expected_second, _) = runs["uninterrupted"]
    assert first == expected_first, "the weights were loaded"
    assert abs(second - expected_second) > 1e-4 * expected_second, "the next update was not the right one"


def write_by_a_spawned_process(rank: int, root: str) -> list[int]:
    """A checkpoint written by Megatron's persistent writer, which is spawned and imports Megatron itself."""
    layout, folder = Layout(), Path(root) / "checkpoint"
    start(layout)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    run = Run(layout)
    run.train(1)
    folder.mkdir()
    queue = AsyncCallsQueue(persistent=True)
    request = dist_checkpointing.save(
        run.state(is_loading=False), str(folder), get_default_save_sharded_strategy(), async_sharded_save=True
    )
    queue.schedule_async_request(request)
    done = queue.maybe_finalize_async_calls(blocking=True)
    queue.close()
    expected = run.train(1)
    stop()
    assert continued(layout, folder)[:1] == expected
    return done


def test_megatrons_spawned_writer_has_the_patches_too(tmp_path: Path) -> None:
    assert run_ranks(1, write_by_a_spawned_process, str(tmp_path), timeout_s=120) == [[0]]
