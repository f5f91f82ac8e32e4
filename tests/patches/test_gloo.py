"""Collectives over gloo on tensors that are not contiguous: wrong without the patch, right with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_rpp_patches
from megatron_rpp.errors import RppError
from megatron_rpp_patches.megatron_core.p060_gloo import NAMES
from tests.dist.ranks import run_ranks


def strided(value: float) -> torch.Tensor:
    """[3, 4], transposed in memory."""
    return (torch.arange(12.0).reshape(4, 3) + value).t()


def collective(name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Runs one collective of two ranks. The output, and what it must be; None where this rank gets none."""
    flat, total = strided(rank).contiguous(), strided(0) + strided(1)
    if name == "broadcast":
        out = strided(rank) if rank else flat
        dist.broadcast(out, 0)
        return out, strided(0)
    if name == "all_reduce":
        out = strided(rank) if rank else flat
        dist.all_reduce(out)
        return out, total
    if name == "reduce":
        out = strided(rank) if rank else flat
        dist.reduce(out, dst=0)
        return None if rank else (out, total)
    if name == "scatter":
        out = strided(9)
        dist.scatter(out, [strided(5), strided(6).contiguous()] if rank == 0 else None, src=0)
        return out, strided(5 + rank)
    if name == "reduce_scatter":
        out = strided(9)
        dist.reduce_scatter(out, [strided(rank), strided(rank + 10).contiguous()])
        return out, total + 20 * rank
    out, source = torch.zeros(3, 4).t(), torch.arange(12.0).reshape(4, 3) + 100 * rank
    dist.all_to_all_single(out, source)
    return out, torch.cat([torch.arange(12.0).reshape(4, 3)[2 * rank : 2 * rank + 2] + 100 * peer for peer in (0, 1)])


def all_collectives(rank: int) -> dict[str, tuple[bool, bool]]:
    """For each: is it right without the patches, is it right with them, on this rank."""
    answers: dict[str, list[Any]] = {name: [] for name in NAMES}
    for is_patched in (False, True):
        if is_patched:
            megatron_rpp_patches.apply("megatron_core")
        for name in NAMES:
            result = collective(name, rank)
            answers[name].append(result is None or torch.equal(*result))
    return {name: (before, after) for name, (before, after) in answers.items()}


@pytest.fixture(scope="module")
def answers() -> list[dict[str, tuple[bool, bool]]]:
    return run_ranks(2, all_collectives)


@pytest.mark.parametrize("name", NAMES)
def test_gloo_is_wrong_about_strided_tensors_without_the_patch(answers: list[dict[str, tuple[bool, bool]]], name: str) -> None:
    assert not all(answer[name][0] for answer in answers), f"gloo is right now: delete the patch of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_gloo_is_right_about_strided_tensors_with_the_patch(answers: list[dict[str, tuple[bool, bool]]], name: str) -> None:
    assert all(answer[name][1] for answer in answers)


def deferred(rank: int) -> list[str]:
    """What is said to strided tensors in collectives that end later, and to contiguous ones."""
    megatron_rpp_patches.apply("megatron_core")
    said = []
    with pytest.raises(RppError) as error:
        dist.all_reduce(strided(rank), async_op=True)
    said.append(str(error.value))
    work = dist.all_reduce(flat := strided(rank).contiguous(), async_op=True)
    work.wait()
    assert torch.equal(flat, strided(0) + strided(1))
    leaf = torch.zeros(4, 3).t().requires_grad_()
    dist.broadcast(leaf.data if rank else leaf.data.fill_(2.0), 0)
    assert torch.equal(leaf.detach(), torch.full((3, 4), 2.0))
    with pytest.raises(RppError) as error, dist._coalescing_manager(async_ops=True):  # last: torch leaves the group in it
        dist.all_reduce(strided(rank))
    said.append(str(error.value))
    return said


def test_a_deferred_collective_on_a_strided_tensor_is_an_error_on_every_rank() -> None:
    for said in run_ranks(2, deferred):
        for message in said:
            assert "torch.distributed.all_reduce" in message
            assert "tensor.contiguous()" in message
