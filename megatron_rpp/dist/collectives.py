"""The few collectives the project needs, with the properties that torch's own do not promise.

Each is entered by every rank of its group, whatever the rank holds. Sums are made in rank order, so that every rank gets
the same bits whatever algorithm the backend would have chosen. Tensors are made contiguous first: nccl refuses strided
ones, and some of gloo's collectives silently send the wrong bytes of them. Every wait has a name and a deadline, and objects
travel as bytes.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.dist.deadline import Deadline, deadline
from megatron_rpp.dist.groups import ranks_of

DEFAULT_DEADLINE_S = 900.0


def all_gather(values: Tensor, group: ProcessGroup, *, name: str = "gather", deadline_s: float = DEFAULT_DEADLINE_S) -> list[Tensor]:
    """The tensor of every rank, in rank order, on the device it came from. Every rank passes the same shape and dtype.

    Units: deadline_s in seconds.
    Raises: DeadlineError when a peer does not come.
    """
    mine = values.detach().to(_wire_device(values, group)).contiguous()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with _named_wait(name, deadline_s, group) as wait:
        _finish(dist.all_gather(gathered, mine, group=group, async_op=True), wait)
    return [part.to(values.device) for part in gathered]


def sum_float64(values: Tensor, group: ProcessGroup, *, name: str = "sum", deadline_s: float = DEFAULT_DEADLINE_S) -> Tensor:
    """Sum over the ranks of a group, in float64 and in rank order: the same bits on every rank and in every run.

    total = ((v[0] + v[1]) + v[2]) + ...   with v[r] the values of the group's rank r, upcast before the first addition
    Shapes: values [...] any real dtype, the same on each rank -> [...] float64
    Units: deadline_s in seconds. Raises: DeadlineError when a peer does not come.
    """
    total, *rest = all_gather(values.detach().to(torch.float64), group, name=name, deadline_s=deadline_s)
    for part in rest:
        total = total + part
    return total


def sum_int64(values: Tensor, group: ProcessGroup, *, name: str = "sum", deadline_s: float = DEFAULT_DEADLINE_S) -> Tensor:
    """Sum of integers over the ranks of a group; exact as long as the total fits 64 bits, whatever the order.

    Shapes: values [...] int64 -> [...] int64
    Units: deadline_s in seconds. Raises: DeadlineError when a peer does not come.
    """
    total, *rest = all_gather(values.to(torch.int64), group, name=name, deadline_s=deadline_s)
    for part in rest:
        total = total + part
    return total


def gather_objects(
    value: Any,
    group: ProcessGroup,
    *,
    name: str = "gather objects",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> list[Any]:
    """What every rank passed, in rank order, on every rank. The group must be one that takes host tensors (gloo).

    Units: deadline_s in seconds, for the whole exchange.
    Raises: DeadlineError when a peer does not come.
    """
    payload = _pack(value)
    with _named_wait(name, deadline_s, group) as wait:
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        _finish(dist.all_gather(lengths, torch.tensor([payload.numel()]), group=group, async_op=True), wait)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        gathered = [torch.empty_like(padded) for _ in lengths]
        _finish(dist.all_gather(gathered, padded, group=group, async_op=True), wait)
    return [_unpack(part[: int(length)]) for part, length in zip(gathered, lengths, strict=True)]


def broadcast_object(
    value: Any,
    group: ProcessGroup,
    *,
    src: int = 0,
    name: str = "broadcast an object",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Any:
    """What the group's rank `src` passed, on every rank; what the others pass is ignored. For gloo groups.

    src: an index into the group, not a global rank. Units: deadline_s in seconds, for the whole exchange.
    Raises: DeadlineError when the source or a peer does not come.
    """
    is_source = dist.get_rank(group) == src
    payload = _pack(value) if is_source else torch.empty(0, dtype=torch.uint8)
    with _named_wait(name, deadline_s, group) as wait:
        length = torch.tensor([payload.numel()])
        _finish(dist.broadcast(length, group_src=src, group=group, async_op=True), wait)
        if not is_source:
            payload = torch.empty(int(length), dtype=torch.uint8)
        _finish(dist.broadcast(payload, group_src=src, group=group, async_op=True), wait)
    return value if is_source else _unpack(payload)


def barrier(group: ProcessGroup, *, name: str, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
    """Returns once every rank of a gloo group is here.

    Raises: DeadlineError when a peer does not come.
    """
    with _named_wait(name, deadline_s, group) as wait:
        _finish(dist.all_reduce(torch.zeros(1), group=group, async_op=True), wait)


def _named_wait(name: str, deadline_s: float, group: ProcessGroup) -> Any:
    ranks = ranks_of(group)
    peers = tuple(rank for rank in ranks if rank != dist.get_rank())
    waiting_for = f"ranks {', '.join(map(str, ranks))} to take part"
    return deadline(name, deadline_s, rank=dist.get_rank(), waiting_for=waiting_for, peers=peers)


def _wire_device(values: Tensor, group: ProcessGroup) -> torch.device:
    """Where the group's backend wants its tensors: nccl takes none of the host, gloo few of a GPU."""
    if dist.get_backend(group) == dist.Backend.NCCL:
        return values.device if values.is_cuda else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _finish(work: Any, wait: Deadline) -> None:
    # A wait of less than a millisecond means "use the group's default" to gloo: a year.
    wait.check()
    work.wait(timedelta(seconds=max(wait.remaining_s, 0.001)))


def _pack(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpack(payload: Tensor) -> Any:
    # The bytes come from another rank of the same run, started by the same user: no stranger can reach this group.
    return pickle.loads(payload.numpy().tobytes())
