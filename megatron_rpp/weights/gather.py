"""The running policy as whole HF tensors, streamed to the ranks that hand them on: engine leaders, or the one that writes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.layout import HFLayout
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.planner import BUCKET_BYTES, Plan, plan
from megatron_rpp.weights.transport import iter_buckets


def iter_hf_tensors(
    live: LiveWeights,
    holders: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    deadline_s: float,
) -> Iterator[dict[str, Tensor]]:
    """HF name -> whole tensor, a bucket at a time, on the ranks in `holders`; empty dicts on the others.

    Collective over the world: every rank iterates to the end, the same number of rounds on each. The values are those of the
    moment their bucket is made, so nothing may train meanwhile. dtype: None sends the live dtype; another is cast to by the
    sender. Units: deadline_s for each bucket.
    Raises: DeadlineError; GeometryError when two ranks would exchange different things.
    Source: what slime, verl and NeMo-RL do with pipeline broadcasts and tensor-parallel all-gathers on every rank; here each
    element goes once to each holder and nowhere else.
    """
    ranks = live.layout.ranks
    target = HFLayout.of(live.layout.model, dtype=dtype or live.layout.dtype, ranks=ranks, holders=holders)
    agreed = plan(live.layout, target, rank=live.rank, nodes=live.nodes, bucket_bytes=bucket_bytes, whole_tensors=True)
    check_agreement(agreed, live, deadline_s)
    yield from iter_buckets(agreed, live.tensors, group=live.groups.world, deadline_s=deadline_s)


def check_agreement(agreed: Plan, live: LiveWeights, deadline_s: float) -> None:
    """A plan that differs between ranks would hang, or worse, would not: compare before the first byte.

    Raises: GeometryError naming each rank's plan; DeadlineError.
    """
    digests = gather_objects(agreed.digest, live.groups.world_cpu, name="compare weight plans", deadline_s=deadline_s)
    if len(set(digests)) != 1:
        raise GeometryError("ranks made different plans", where="weights", got={rank: digest[:12] for rank, digest in enumerate(digests)})
