"""The running policy as the shards of another layout: each rank gets what it keeps there, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from megatron_rpp.weights.fp8 import Fp8Source, Fp8Tensors
from megatron_rpp.weights.gather import check_agreement
from megatron_rpp.weights.layout import Layout
from megatron_rpp.weights.live import LiveWeights
from megatron_rpp.weights.planner import BUCKET_BYTES, plan
from megatron_rpp.weights.transport import Delivery, Empty, Staging, deliver


class ShardStream:
    """The way from a running policy to one other layout, with its plan and its buffers, to be used again after every step.

    live: the policy. target: who keeps what. fp8: the policy's layout where it offers FP8 too, for a target that asks for it.
    empty: see Staging. Units: bucket_bytes as in planner.plan; deadline_s for each bucket.
    """

    def __init__(
        self,
        live: LiveWeights,
        target: Layout,
        fp8: Fp8Source | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        deadline_s: float,
        empty: Empty | None = None,
    ) -> None:
        self._live, self._fp8, self._deadline_s, self._empty = live, fp8, deadline_s, empty
        self._plan = plan(fp8 or live.layout, target, rank=live.rank, nodes=live.nodes, bucket_bytes=bucket_bytes)
        self._is_agreed = False
        self._staging: Staging | None = None

    def deliveries(self) -> Iterator[Delivery]:
        """This rank's share of every bucket, also where it is empty; see transport.deliver.

        Collective over the world: every rank iterates to the end. Nothing may train meanwhile.
        Raises: DeadlineError; GeometryError when two ranks would exchange different things.
        """
        if not self._is_agreed:
            check_agreement(self._plan, self._live, self._deadline_s)
            self._is_agreed = True
        if self._staging is None:
            device = next(iter(self._live.tensors.values())).device
            self._staging = Staging(self._plan, self._live.rank, device=device, empty=self._empty)
        staging, self._staging = self._staging, None  # a pass that fails leaves buffers that something may still write to
        group, deadline_s = self._live.groups.world, self._deadline_s
        tensors = self._live.tensors if self._fp8 is None else Fp8Tensors(self._fp8, self._live.rank, self._live.tensors)
        with closing(deliver(self._plan, tensors, group=group, deadline_s=deadline_s, staging=staging)) as buckets:
            yield from buckets
        self._staging = staging
