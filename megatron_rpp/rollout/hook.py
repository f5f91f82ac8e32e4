"""SGLang's custom weight loader: runs in every scheduler process and fills its model from memory shared by the client.

What travels through SGLang is a JSON order in the place of a tensor's name; the tensors themselves lie in a memory file
of a trainer (memory.py), or where it has them on the GPU (device_memory.py). coverage.py sees to it that an update brings
everything, once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rpp.rollout import coverage, worker

LOADER = "megatron_rpp.rollout.hook.load"
CHECKSUM_WORDS = 1 << 24  # words at a time; they are widened to 64 bits


_updates: dict[int, coverage.Update] = {}  # by model; SGLang calls `load` with nothing else that lasts


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Entry point of SGLang's custom_weight_loader.

    Nothing is raised: a rank that leaves here early leaves its tensor-parallel peers in a barrier for two hours. What
    went wrong goes to a file that the server reads after the barrier.
    """
    for name, _ in named_tensors:
        order, result, error = json.loads(name), None, None
        try:
            result = checksums(model) if order["is_checksum"] else _fill(model, order)
        except Exception as reason:  # noqa: BLE001 load_weights of any model may raise anything; see above
            error = f"{type(reason).__name__}: {reason}"
        worker.write_json(_status_file(_rank()), {"ticket": order["ticket"], "result": result, "error": error})


def checksums(model: nn.Module) -> dict[str, int]:
    """A number for each parameter of this rank: sum over its 2-byte words of word * (1 + position mod 65521), mod 2**64.

    Bits count, not values, and so does their order. Computed where the parameter is.
    """
    found = {}
    for name, parameter in model.named_parameters():
        words = parameter.detach().contiguous().view(torch.uint8).flatten()
        words = torch.nn.functional.pad(words, (0, words.numel() % 2)).view(torch.int16)
        total = 0
        for start in range(0, words.numel(), CHECKSUM_WORDS):
            part = words[start : start + CHECKSUM_WORDS].to(torch.int64)
            weight = torch.arange(start, start + part.numel(), device=part.device) % 65521 + 1
            total += int((part * weight).sum())
        found[name] = total % 2**64
    return found


def _fill(model: nn.Module, order: dict[str, Any]) -> None:
    update = _updates.get(id(model))
    if update is None or update.session != order["session"]:
        update = _updates[id(model)] = coverage.open_update(order["session"], order["is_sharded"], _rank(), model)
    if order["bucket"] is None:
        update.finish(model)
        return
    update.take(model, order["bucket"])
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()  # the client may write the next bucket as soon as it is answered


def _rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_rank


def _status_file(rank: int) -> Path:
    return worker.folder() / f"load-{rank}.json"


def read_results(num_ranks: int, ticket: int) -> tuple[list[Any], list[str]]:
    """What each rank made of the order of this ticket, and what went wrong; no errors when all is well. Called by the server."""
    results, errors = [], []
    for rank in range(num_ranks):
        path = _status_file(rank)
        answer = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"ticket": None}
        if answer["ticket"] != ticket:
            errors.append(f"rank {rank} did not see the order")
        elif answer["error"] is not None:
            errors.append(f"rank {rank}: {answer['error']}")
        else:
            results.append(answer["result"])
    return results, errors
