"""Carries out a plan over a process group: one all_to_all_single for each bucket, on gloo or nccl.

Messages are bytes in contiguous buffers (gloo sends the wrong elements of a strided tensor without a word): the sender
packs and casts, the receiver looks at what came through views. While a bucket travels the next one is packed, and the
consumer still holds the one before. Every rank takes part in every bucket.
There is no all-gather for pipelines whose tensor parallel size is the engine's. It would pack once instead of once for each
receiver, but packing is hidden behind the bucket that travels, and the same bytes leave each GPU either way; stages that hold
unlike amounts would pad to the largest. On gloo it takes 1.5 to 3 times as long (tools/bench_sync.py --path all-gather, four
ranks); it was not measured on nccl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_rpp.dist.deadline import deadline
from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.buckets import Bucket, Transfer
from megatron_rpp.weights.planner import Plan
from megatron_rpp.weights.rect import view

Empty = Callable[[int, torch.device], Tensor]  # bytes of memory -> uint8 tensor

_OUTBOXES = 2  # one travels, one is packed


class Staging:
    """The buffers of one rank for the buckets of one plan: made once, used in turn, kept for the next time if the caller likes.

    slots: how many buckets may be on this rank at a time, the one that is arriving among them. With 2 the consumer works on
    one bucket while the next arrives; a third lets it hold two. keep_copies: False leaves out room for what stays on its GPU.
    After a pass that failed, make another: what is still in flight may yet write here.
    empty: makes a slot of so many bytes on a device, for a reader that needs memory of some kind; torch's own by default.
    """

    def __init__(
        self, plan: Plan, rank: int, *, device: torch.device, slots: int = 2, keep_copies: bool = True, empty: Empty | None = None
    ) -> None:
        if slots < 2:
            raise GeometryError("one slot for what arrives and one for what is held", where="staging", expected=">= 2 slots", got=slots)
        arriving = [bucket.inbox_bytes(rank) if keep_copies else bucket.received_bytes(rank) for bucket in plan.buckets]
        leaving = [bucket.sent_bytes(rank) for bucket in plan.buckets]
        self.keep_copies = keep_copies
        self.outboxes = [_empty(max(leaving, default=0), device) for _ in range(_OUTBOXES)]
        self.inboxes = [(empty or _empty)(max(arriving, default=0), device) for _ in range(slots)]
        self.held: list[int | None] = [None] * slots  # number of the bucket in each slot

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in (*self.outboxes, *self.inboxes))

    def take(self, number: int) -> Tensor:
        """The slot of a bucket. Raises: GeometryError when its last bucket was not released: its reader would see it change."""
        slot = number % len(self.inboxes)
        if self.held[slot] is not None:
            fix = "release each delivery before asking for the next, or give the staging more slots"
            raise GeometryError(f"bucket {self.held[slot] + 1} is still held", where=f"weights bucket {number + 1}", fix=fix)
        self.held[slot] = number
        return self.inboxes[slot]


@dataclass
class Delivery:
    """One bucket on the rank that it came to, readable until `release`, or the end of `with delivery:`.

    parts: every transfer to this rank and its elements [rows, cols] in the wire's dtype, as views of `inbox` (bytes; offsets
    as in Bucket.inbox). Copies on one GPU are views of the source instead, in its dtype, when the staging keeps none.
    On a GPU, release only once the reader's work is done or queued on the same stream: the next bucket overwrites the slot.
    """

    number: int
    bucket: Bucket
    inbox: Tensor
    parts: list[tuple[Transfer, Tensor]]
    _staging: Staging = field(repr=False)

    def release(self) -> None:
        """Lets the slot be written again. The views are gone; a second call does nothing."""
        slot = self.number % len(self._staging.inboxes)
        if self._staging.held[slot] == self.number:
            self._staging.held[slot] = None
        self.parts = []

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def deliver(
    plan: Plan, sources: Mapping[str, Tensor], *, group: ProcessGroup, deadline_s: float, staging: Staging | None = None
) -> Iterator[Delivery]:
    """This rank's share of every bucket in order, also where it is empty. The next bucket travels while one is held.

    Collective: every rank of `group` (the whole world, in rank order) runs the iterator to its end, the same number of rounds
    on each. A consumer that stops early leaves its peers waiting until their deadline. The values are those of the moment
    that their bucket is packed, one round ahead. Padding belongs to no transfer.
    plan: this rank's, or the whole. sources: this rank's tensors under the names of the plan's source layout. staging: made
    for one pass when None. Units: deadline_s for each bucket, counted from when this rank has nothing else to do.
    Raises: DeadlineError when a peer does not come; GeometryError when the plan is for another number of ranks, or a slot's
    turn comes before its bucket was released.
    """
    if dist.get_world_size(group) != plan.ranks:
        raise GeometryError("the plan is for another world", where="transport", expected=plan.ranks, got=dist.get_world_size(group))
    rank = dist.get_rank(group)
    staging = staging or Staging(plan, rank, device=next(iter(sources.values())).device)
    exchange = _Exchange(plan, rank, sources, staging, group)
    travelling = exchange.start(0) if plan.buckets else None
    for number, bucket in enumerate(plan.buckets):
        is_last = number + 1 == len(plan.buckets)
        if not is_last:
            exchange.pack(number + 1)
        _wait(travelling, f"weights bucket {number + 1} of {len(plan.buckets)}", rank, deadline_s)
        travelling = None if is_last else exchange.start(number + 1)
        yield Delivery(number, bucket, exchange.inbox(number), exchange.parts(number), staging)


def iter_buckets(plan: Plan, sources: Mapping[str, Tensor], *, group: ProcessGroup, deadline_s: float) -> Iterator[dict[str, Tensor]]:
    """Whole destination tensors of this rank, with the bucket that completes them; an empty dict where one completes none.

    Collective and bounded as `deliver`. The tensors are the caller's to keep, padding is zero. With a plan that cuts tensors
    a few unfinished ones wait here, about one for each flow to this rank.
    Raises: what `deliver` raises.
    """
    rank, device = dist.get_rank(group), next((tensor.device for tensor in sources.values()), torch.device("cpu"))
    wanted = {local.name: local for bucket in plan.buckets for local in bucket.completed.get(rank, ())}
    unfinished: dict[str, Tensor] = {}

    def target(name: str) -> Tensor:
        if name not in unfinished:
            local = wanted[name]
            make = torch.zeros if local.has_padding else torch.empty
            unfinished[name] = make(local.shape, dtype=local.dtype, device=device)
        return unfinished[name]

    staging = Staging(plan, rank, device=device, keep_copies=False)
    for delivery in deliver(plan, sources, group=group, deadline_s=deadline_s, staging=staging):
        with delivery, torch.no_grad():
            for transfer, values in delivery.parts:
                view(target(transfer.dst_local), transfer.dst_piece, transfer.rect).copy_(values)
        finished = {local.name: target(local.name) for local in delivery.bucket.completed.get(rank, ())}
        for name in finished:
            del unfinished[name]
        yield finished


class _Exchange:
    """Packs and sends the buckets of one pass."""

    def __init__(self, plan: Plan, rank: int, sources: Mapping[str, Tensor], staging: Staging, group: ProcessGroup) -> None:
        self._plan, self._rank, self._sources, self._staging, self._group = plan, rank, sources, staging, group
        self._packed = -1

    @torch.no_grad()
    def pack(self, number: int) -> None:
        """Fills an outbox with the messages of a bucket, and its slot with the copies that stay here."""
        bucket, slot, self._packed = self._plan.buckets[number], self._staging.take(number), number
        outbox = self._staging.outboxes[number % _OUTBOXES]
        for transfer, at in bucket.outbox(self._rank):
            _segment(outbox, at, transfer).copy_(self._source(transfer))
        if self._staging.keep_copies:
            for transfer, at in bucket.inbox(self._rank):
                if transfer.src == self._rank:
                    _segment(slot, at, transfer).copy_(self._source(transfer))

    def start(self, number: int) -> Work | None:
        """Sends a bucket, packed before or now. None when no rank has anything for another."""
        if self._packed < number:
            self.pack(number)
        if self._plan.is_local:
            return None
        bucket, rank, ranks = self._plan.buckets[number], self._rank, range(self._plan.ranks)
        send_bytes = [bucket.message_bytes(rank, peer) if peer != rank else 0 for peer in ranks]
        recv_bytes = [bucket.message_bytes(peer, rank) if peer != rank else 0 for peer in ranks]
        sent = self._staging.outboxes[number % _OUTBOXES][: sum(send_bytes)]
        received = self._slot(number)[: sum(recv_bytes)]
        return dist.all_to_all_single(received, sent, recv_bytes, send_bytes, group=self._group, async_op=True)

    def inbox(self, number: int) -> Tensor:
        """The bytes of a bucket that arrived."""
        bucket = self._plan.buckets[number]
        size = bucket.inbox_bytes(self._rank) if self._staging.keep_copies else bucket.received_bytes(self._rank)
        return self._slot(number)[:size]

    def parts(self, number: int) -> list[tuple[Transfer, Tensor]]:
        """Every transfer of a bucket to this rank with its elements."""
        slot, found = self._slot(number), []
        for transfer, at in self._plan.buckets[number].inbox(self._rank):
            stays = transfer.src == self._rank and not self._staging.keep_copies
            found.append((transfer, self._source(transfer) if stays else _segment(slot, at, transfer)))
        return found

    def _slot(self, number: int) -> Tensor:
        return self._staging.inboxes[number % len(self._staging.inboxes)]

    def _source(self, transfer: Transfer) -> Tensor:
        return view(self._sources[transfer.src_local], transfer.src_piece, transfer.rect)


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _segment(buffer: Tensor, at: int, transfer: Transfer) -> Tensor:
    """Where a transfer lies in a buffer, as [rows, cols] of the wire's dtype."""
    return buffer[at : at + transfer.num_bytes].view(transfer.dtype).view(transfer.rect.rows, transfer.rect.cols)


def _wait(work: Work | None, name: str, rank: int, deadline_s: float) -> None:
    if work is None:
        return
    with deadline(name, deadline_s, rank=rank, waiting_for="all ranks to take part") as wait:
        work.wait(timedelta(seconds=max(wait.remaining_s, 0.001)))  # less would be the group's default
