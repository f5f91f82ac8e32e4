"""Time two ways of giving new weights to an engine, in one run: shard to shard, and by way of whole tensors on a leader.

    python tools/bench_sync.py [--megabytes N] [--repeats N] [--bucket-mib N] [--path all-gather]

Four gloo processes hold a Llama trained at TP2 x PP2; the engine is SGLang's TP4 on the same processes, in the order that
keeps most bytes where they are. `direct` carries out a plan between the two layouts. `gather` is what an engine needs that
takes whole Hugging Face tensors: the leader receives them, lays them in shared memory, and every engine rank cuts its own
part out. Both are checked bitwise, timed in turn, from a barrier to a barrier. Prints a JSON object and one line for people;
exit status 1 when the contents are wrong.

With `--path all-gather` the policy is trained at PP4 and every process is an engine of its own, so that each stage sends the
same to all others: `direct`, which packs a message for each of them, against one all-gather for each bucket, packed once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.rollout.memory import Outbox, unpack
from megatron_rpp.weights.buckets import Transfer
from megatron_rpp.weights.devices import Permuted, best_devices
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import HFLayout, Layout, MegatronLayout
from megatron_rpp.weights.planner import BUCKET_BYTES, plan
from megatron_rpp.weights.rect import view
from megatron_rpp.weights.sglang_layout import SGLangLayout
from megatron_rpp.weights.transport import Staging, deliver, iter_buckets

RANKS, LEADER, DTYPE, DEADLINE_S = 4, 0, torch.bfloat16, 120.0
Ways = dict[str, Callable[[], None]]


def model_of(megabytes: float) -> Model:
    """A Llama of at least so many megabytes (10^6 bytes) in bfloat16: as many layers as that takes."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 16000,
    }
    while num_bytes(model := describe(config)) < megabytes * 1e6:
        config["num_hidden_layers"] += 4  # at most four stages
    return model


def num_bytes(model: Model) -> int:
    return sum(torch.Size(shape).numel() for shape in model.hf_shapes.values()) * DTYPE.itemsize


@dataclass(frozen=True)
class Setting:
    """What one process works on: its shards on both sides, and the plan sizes."""

    rank: int
    model: Model
    src: Layout
    dst: Layout
    sources: dict[str, Tensor]
    targets: dict[str, Tensor]
    bucket_bytes: int

    @classmethod
    def of(cls, rank: int, megabytes: float, bucket_bytes: int, path: str) -> Setting:
        model = model_of(megabytes)
        if path == "all-gather":
            src, dst = MegatronLayout.even(model, pp=RANKS, dtype=DTYPE), SGLangLayout(model, 1, DTYPE, engines=RANKS)
        else:
            src, engine = MegatronLayout.even(model, tp=2, pp=2, dtype=DTYPE), SGLangLayout(model, RANKS, DTYPE)
            dst = Permuted(engine, best_devices(src, engine, engine=tuple(range(RANKS))))
        sources = {local.name: torch.zeros(local.shape, dtype=DTYPE) for local in src.locals(rank)}
        targets = {local.name: torch.zeros(local.shape, dtype=DTYPE) for local in dst.locals(rank)}
        fill(src, rank, sources)
        return cls(rank, model, src, dst, sources, targets, bucket_bytes)

    def direct(self) -> Callable[[], None]:
        """Shard to shard, over staging that is made once."""
        agreed = plan(self.src, self.dst, rank=self.rank, bucket_bytes=self.bucket_bytes)
        staging = Staging(agreed, self.rank, device=torch.device("cpu"), keep_copies=False)

        def run() -> None:
            for delivery in deliver(agreed, self.sources, group=dist.group.WORLD, deadline_s=DEADLINE_S, staging=staging):
                with delivery:
                    for transfer, values in delivery.parts:
                        view(self.targets[transfer.dst_local], transfer.dst_piece, transfer.rect).copy_(values)

        return run

    def all_gather(self) -> Callable[[], None]:
        """What every stage holds of a bucket to all ranks at once; the next one is packed meanwhile, as in `direct`."""
        agreed = plan(self.src, self.dst, bucket_bytes=self.bucket_bytes)
        mine = [bucket.between(self.rank, (self.rank + 1) % RANKS) for bucket in agreed.buckets]
        longest = max(bucket.message_bytes(src, (src + 1) % RANKS) for bucket in agreed.buckets for src in range(RANKS))
        packed = [torch.empty(longest, dtype=torch.uint8) for _ in range(2)]
        arrived = torch.empty(RANKS * longest, dtype=torch.uint8)

        def part(flat: Tensor, at: int, transfer: Transfer) -> Tensor:
            return flat[at : at + transfer.num_bytes].view(transfer.dtype).view(transfer.rect.rows, transfer.rect.cols)

        def pack(number: int) -> Tensor:
            at = 0
            for transfer in mine[number]:
                source = view(self.sources[transfer.src_local], transfer.src_piece, transfer.rect)
                part(packed[number % 2], at, transfer).copy_(source)
                at += transfer.num_bytes
            return packed[number % 2]

        def run() -> None:
            ready = pack(0)
            for number, bucket in enumerate(agreed.buckets):
                work = dist.all_gather(list(arrived.chunk(RANKS)), ready, async_op=True)
                ready = pack(number + 1) if number + 1 < len(mine) else ready
                work.wait()
                for src in range(RANKS):
                    at = src * longest
                    # A stage's own come around too, in the order in which it sent them.
                    for transfer in mine[number] if src == self.rank else bucket.between(src, self.rank):
                        view(self.targets[transfer.dst_local], transfer.dst_piece, transfer.rect).copy_(part(arrived, at, transfer))
                        at += transfer.num_bytes

        return run

    def gather(self) -> Callable[[], None]:
        """Whole tensors on the leader, in shared memory, and everyone's own part out of that."""
        to = HFLayout.of(self.model, dtype=DTYPE, ranks=RANKS, holders=(LEADER,))
        agreed = plan(self.src, to, rank=self.rank, bucket_bytes=self.bucket_bytes, whole_tensors=True)
        pieces: dict[str, list[tuple[str, Any]]] = {}
        for local in self.dst.locals(self.rank):
            for piece in local.pieces:
                pieces.setdefault(piece.rect.hf, []).append((local.name, piece))
        outbox = Outbox()

        def run() -> None:
            for bucket in iter_buckets(agreed, self.sources, group=dist.group.WORLD, deadline_s=DEADLINE_S):
                said = [outbox.pack(list(bucket.items())) if self.rank == LEADER else None]
                dist.broadcast_object_list(said, src=LEADER)
                for hf, tensor in unpack(said[0]):
                    matrix = tensor if tensor.dim() == 2 else tensor[:, None]
                    for name, piece in pieces.get(hf, ()):
                        rect = piece.rect
                        part = matrix[rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols]
                        view(self.targets[name], piece, rect).copy_(part)
                dist.barrier()  # the memory is written again with the next bucket

        return run

    def is_right(self) -> bool:
        """True when the engine's shards are those of the model."""
        expected = {name: torch.zeros_like(tensor) for name, tensor in self.targets.items()}
        fill(self.dst, self.rank, expected)
        return all(torch.equal(self.targets[name], expected[name]) for name in expected)


def fill(layout: Layout, rank: int, tensors: dict[str, Tensor]) -> None:
    """Every element of the model from its HF coordinates, so that both sides can be made without the other."""
    for local in layout.locals(rank):
        for piece in local.pieces:
            rect = piece.rect
            rows, cols = torch.arange(rect.row, rect.row + rect.rows), torch.arange(rect.col, rect.col + rect.cols)
            seed = sum(rect.hf.encode()) * 31 % 8191
            view(tensors[local.name], piece, rect).copy_((rows[:, None] * 7919 + cols[None, :] * 104729 + seed) % 251 - 125)


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One process: both ways in turn, once unmeasured and checked, then timed."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=DEADLINE_S))
    setting = Setting.of(rank, options.megabytes, options.bucket_mib * 2**20, options.path)
    other = setting.all_gather() if options.path == "all-gather" else setting.gather()
    ways: Ways = {"direct": setting.direct(), options.path: other}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for repeat in range(options.repeats + 1):
            for name, run in ways.items():
                if repeat == 0:
                    for tensor in setting.targets.values():
                        tensor.zero_()
                dist.barrier()
                start = time.perf_counter()
                run()
                dist.barrier()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                elif not setting.is_right():
                    sys.exit(f"rank {rank}: {name} brought the wrong weights")
    if rank == LEADER:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=256.0, help="size of the model in bfloat16, 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each way; the median counts")
    parser.add_argument("--bucket-mib", type=int, default=BUCKET_BYTES // 2**20)
    parser.add_argument("--path", choices=("gather", "all-gather"), default="gather", help="what the direct path is timed against")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as folder:
        children = [context.Process(target=work, args=(rank, folder, options)) for rank in range(RANKS)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            print(f"failed: exit codes {[child.exitcode for child in children]}", file=sys.stderr)
            return 1
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratio, size = median[options.path] / median["direct"], num_bytes(model_of(options.megabytes)) / 1e6
    print(json.dumps({"megabytes": size, "bucket_mib": options.bucket_mib, "median_s": median, "seconds": seconds, "ratio": ratio}))
    layouts = "PP4 -> 4 engines" if options.path == "all-gather" else "TP2 x PP2 -> TP4"
    times = f"direct {median['direct']:.3f} s, {options.path} {median[options.path]:.3f} s, {ratio:.1f} times as long"
    print(f"{size:.0f} MB, {layouts}: {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
