"""Carries out a plan over a process group: one all_to_all_single for each bucket, on gloo or nccl.

Messages are bytes in contiguous buffers (gloo sends the wrong elements of a strided tensor without a word): the sender
packs and casts, the receiver unpacks, and what stays on one GPU is copied directly. Every rank takes part in every bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.dist.deadline import deadline
from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.planner import Bucket, Plan, Transfer
from megatron_rpp.weights.rect import view


def iter_buckets(plan: Plan, sources: Mapping[str, Tensor], *, group: ProcessGroup, deadline_s: float) -> Iterator[dict[str, Tensor]]:
    """The destination tensors of this rank, bucket by bucket; an empty dict where a bucket brings this rank nothing.

    Collective: every rank of `group` (the whole world, in rank order) runs the iterator to its end, the same number of rounds
    on each. A consumer that stops early leaves its peers waiting until their deadline. The tensors are the caller's to keep.
    sources: this rank's tensors under the names of the plan's source layout. Units: deadline_s for each bucket.
    Raises: DeadlineError when a peer does not come; GeometryError when the plan is for another number of ranks.
    """
    if dist.get_world_size(group) != plan.ranks:
        raise GeometryError("the plan is for another world", where="transport", expected=plan.ranks, got=dist.get_world_size(group))
    rank, device = dist.get_rank(group), next(iter(sources.values())).device
    for number, bucket in enumerate(plan.buckets):
        targets = {}
        for local in bucket.completed.get(rank, ()):
            make = torch.zeros if local.has_padding else torch.empty
            targets[local.name] = make(local.shape, dtype=local.dtype, device=device)
        name = f"weights bucket {number + 1} of {len(plan.buckets)}"
        with torch.no_grad():
            exchange(bucket, sources, targets, group=group, deadline_s=deadline_s, name=name)
        yield targets


def exchange(
    bucket: Bucket, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, group: ProcessGroup, deadline_s: float, name: str
) -> None:
    """Moves one bucket: from `sources` of every rank into `targets` of every rank, in place.

    Raises: DeadlineError, named `name`, when a peer does not come in time.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    device = next(iter(sources.values())).device
    for transfer in bucket.between(rank, rank):
        _target(transfer, targets).copy_(_source(transfer, sources))
    if bucket.is_local:
        return
    send_bytes = [bucket.message_bytes(rank, peer) for peer in range(ranks)]
    recv_bytes = [bucket.message_bytes(peer, rank) for peer in range(ranks)]
    sent = torch.zeros(sum(send_bytes), dtype=torch.uint8, device=device)
    received = torch.empty(sum(recv_bytes), dtype=torch.uint8, device=device)
    for peer, message in enumerate(sent.split(send_bytes)):
        for transfer, segment in _segments(bucket, rank, peer, message):
            segment.copy_(_source(transfer, sources))
    with deadline(name, deadline_s, rank=rank, waiting_for=f"all {ranks} ranks to take part") as wait:
        work = dist.all_to_all_single(received, sent, recv_bytes, send_bytes, group=group, async_op=True)
        work.wait(timedelta(seconds=wait.remaining_s))
    for peer, message in enumerate(received.split(recv_bytes)):
        for transfer, segment in _segments(bucket, peer, rank, message):
            _target(transfer, targets).copy_(segment)


def _segments(bucket: Bucket, src: int, dst: int, message: Tensor) -> Iterator[tuple[Transfer, Tensor]]:
    """Where each transfer lies in the message from src to dst, as [rows, cols] of the wire's dtype."""
    if src == dst:
        return
    start = 0
    for transfer in bucket.between(src, dst):
        end = start + transfer.num_bytes
        yield transfer, message[start:end].view(transfer.dtype).view(transfer.rect.rows, transfer.rect.cols)
        start = end


def _source(transfer: Transfer, sources: Mapping[str, Tensor]) -> Tensor:
    return view(sources[transfer.src_local], transfer.src_piece, transfer.rect)


def _target(transfer: Transfer, targets: Mapping[str, Tensor]) -> Tensor:
    return view(targets[transfer.dst_local], transfer.dst_piece, transfer.rect)
