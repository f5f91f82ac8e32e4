"""Running micro-batches through Megatron's pipeline schedule, for log-probabilities alone or with a loss behind them.

The schedule (none, 1F1B, interleaved) is Megatron's; this module gives it the forward step, and brings what the last stage
computed back to every rank of the replica. Imports megatron: import it only after `init.start`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch import distributed as dist

from megatron_rpp.dist.groups import Groups
from megatron_rpp.mcore.microbatch import Microbatch
from megatron_rpp.mcore.sums import Sums, add
from megatron_rpp.types import PackedBatch

# (logp_new_T, entropy_T, batch, adv_T) -> (sum of the loss over tokens, number of tokens, {name: sum or, for _max, maximum})
Objective = Callable[[Tensor, Tensor, PackedBatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def run_logprobs(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], num_tokens: int, groups: Groups) -> Tensor:
    """Log-probabilities of all masked tokens of a batch, [T] float32, 0 elsewhere, on every rank of the replica.

    num_tokens: T of the batch that the micro-batches were cut from.
    """
    logp_T = torch.zeros(num_tokens, dtype=torch.float32, device=microbatches[0].tokens_1T.device)

    def keep(microbatch: Microbatch, output_2N: Tensor, non_loss_data: bool = False) -> None:
        logp_T[microbatch.source_T[microbatch.answer_N]] = output_2N[0].to(torch.float32)

    with torch.no_grad():
        _run(chunks, microbatches, keep, forward_only=True)
    if groups.cp_size > 1 and groups.is_last_stage:
        dist.all_reduce(logp_T, group=groups.cp)  # each token is non-zero on one rank, so the sum is exact
    if groups.pp_size > 1:
        dist.broadcast(logp_T, group=groups.pp, group_src=groups.pp_size - 1)
    return logp_T


def run_loss(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], adv_T: Tensor, objective: Objective) -> Sums:
    """Forward and backward of one optimiser step. Gradients end in Megatron's buffers, summed over dp and divided by its tokens.

    The objective's sums go to Megatron unscaled together with its number of tokens (`calculate_per_token_loss`), which makes
    the gradient that of sum(loss) / sum(num_tokens) over all ranks and micro-batches, however they were cut.
    adv_T: advantages of the batch that the micro-batches were cut from.
    """
    rows: list[dict[str, Tensor]] = []

    def loss_func(microbatch: Microbatch, output_2N: Tensor) -> tuple[Tensor, Tensor, dict]:
        logp_T, entropy_T = microbatch.spread(output_2N[0]), microbatch.spread(output_2N[1])
        loss, count, values = objective(logp_T, entropy_T, microbatch.batch, adv_T[microbatch.source_T])
        # detached now: a pipeline schedule empties the loss itself once it has handed it on
        rows.append({name: value.detach().to(torch.float64) for name, value in {"loss": loss, "num_tokens": count, **values}.items()})
        # an objective that looked at no token need not touch the graph; the backward pass must run all the same
        return loss if loss.requires_grad else loss + 0.0 * output_2N.sum(), count.to(torch.int), {}

    _run(chunks, microbatches, loss_func, forward_only=False)
    if not rows:
        return Sums()
    # one copy to the host for everything
    table = torch.stack([torch.stack(list(row.values())) for row in rows]).tolist()
    measured = [dict(zip(rows[0], line, strict=True)) for line in table]
    return add(Sums(row.pop("loss"), int(row.pop("num_tokens")), row) for row in measured)


def _run(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], loss_func: Callable, *, forward_only: bool) -> None:
    def forward_step(iterator, chunk):
        microbatch = next(iterator)
        output = chunk(
            microbatch.tokens_1T,
            microbatch.position_1T,
            None,
            labels=microbatch.query,
            packed_seq_params=microbatch.packed_seq_params,
        )
        return output, partial(loss_func, microbatch)

    is_split = len(chunks) > 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks] if is_split else iter(microbatches),
        model=list(chunks) if is_split else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens_1T.shape[1],  # only a fallback: lengths travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
