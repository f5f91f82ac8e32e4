"""Processes that multiprocessing starts have the patches before their first import, and pay nothing until then."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from typing import Any

import pytest

import megatron_rpp_patches
from tests.dist.ranks import run_ranks


def look(depth: int) -> list[dict[str, Any]]:
    """In a child: the rows of its report, then those of its child; the last one imports Megatron."""
    rows = megatron_rpp_patches.report()
    if depth:
        return [{"rows": rows}, *ask(multiprocessing.get_context("spawn"), depth - 1)]
    before = "megatron" in sys.modules
    import megatron.core.utils
    import torch

    device = megatron.core.utils.torch.cuda.current_device()
    return [{"rows": rows, "before": before, "device": str(device), "is_available": torch.cuda.is_available()}]


def answer(connection: Any, depth: int) -> None:
    connection.send(look(depth))


def ask(context: Any, depth: int) -> list[dict[str, Any]]:
    here, there = context.Pipe()
    child = context.Process(target=answer, args=(there, depth), name="writer")
    child.start()
    assert here.poll(90), "the child did not answer"
    found = here.recv()
    child.join(30)
    return found


def ask_children(rank: int, method: str, depth: int) -> list[dict[str, Any]]:
    """In a process of its own, which applies the patches and starts a child."""
    megatron_rpp_patches.apply("megatron_core", role="trainer")
    return [{"rows": megatron_rpp_patches.report()}, *ask(multiprocessing.get_context(method), depth)]


@pytest.mark.parametrize(("method", "depth"), [("spawn", 1), ("forkserver", 0)])
def test_children_and_their_children_have_the_same_patches(method: str, depth: int) -> None:
    (processes,) = run_ranks(1, ask_children, method, depth, init=False, timeout_s=150)
    mine, *children = processes
    assert len(children) == depth + 1
    assert {row["role"] for row in mine["rows"]} == {"trainer"}
    for child in children:
        assert [(row["id"], row["hash"]) for row in child["rows"]] == [(row["id"], row["hash"]) for row in mine["rows"]]
        assert {row["role"] for row in child["rows"]} == {"writer"}
    assert len({each["rows"][0]["pid"] for each in processes}) == len(processes)
    assert (children[-1]["before"], children[-1]["device"], children[-1]["is_available"]) == (False, "cpu", False)


IN_A_CHILD = "'torch' in __import__('sys').modules, len(__import__('megatron_rpp_patches').report())"


@pytest.mark.parametrize(("children", "expected"), [(True, (False, 24)), (False, (False, 0))])
def test_a_child_with_another_job_does_not_import_torch_for_the_patches(children: bool, expected: tuple[bool, int]) -> None:
    """The queue server of a checkpoint is such a child. It can also be left alone."""
    code = f"""
import multiprocessing, megatron_rpp_patches
megatron_rpp_patches.apply("megatron_core", children={children})
with multiprocessing.get_context("spawn").Pool(1) as pool:
    print(pool.apply(eval, ({IN_A_CHILD!r},)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(expected), done.stderr
