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

# (each row of what the last stage answers, as [T]; batch, target_T) ->
# (summand of the loss, summand of its denominator, {name: sum over masked tokens or, for _max, maximum})
Objective = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]


def run_answers(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], num_tokens: int, groups: Groups) -> Tensor:
    """The first answer of the last stage to all masked tokens of a batch: their log-probabilities, or a critic's values.

    [T] float32, 0 elsewhere, on every rank of the replica.

    num_tokens: T of the batch that the micro-batches were cut from.
    """
    answer_T = torch.zeros(num_tokens, dtype=torch.float32, device=microbatches[0].tokens_1T.device)

    def keep(microbatch: Microbatch, output_RN: Tensor, non_loss_data: bool = False) -> None:
        answer_T[microbatch.source_T[microbatch.answer_N]] = output_RN[0].to(torch.float32)

    with torch.no_grad():
        _run(chunks, microbatches, keep, forward_only=True)
    if groups.is_last_stage:
        answer_T = whole_responses(answer_T, groups)
    if groups.pp_size > 1:
        dist.broadcast(answer_T, group=groups.pp, group_src=groups.pp_size - 1)
    return answer_T


def run_loss(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], target_T: Tensor, objective: Objective, groups: Groups
) -> Sums:
    """Forward and backward of one optimiser step. Gradients end in Megatron's buffers, summed over dp and cp and divided.

    The objective's loss goes to Megatron unscaled together with its denominator (`calculate_per_token_loss`, whatever the
    objective counts), which makes the gradient that of sum(loss) / sum(denominator) over all ranks and micro-batches, however
    they were cut. The objective sees whole responses: context parallelism ends here. Each context-parallel rank computes the whole
    loss, which reaches the weights through its own tokens' answers, and the first of them alone tells the denominator.
    target_T: advantages, or returns, of the batch that the micro-batches were cut from.
    """
    rows: list[dict[str, Tensor]] = []
    is_counted = groups.coords.cp == 0

    def loss_func(microbatch: Microbatch, output_RN: Tensor) -> tuple[Tensor, Tensor, dict]:
        answer_RT = whole_responses(microbatch.spread(output_RN), groups)
        loss, denominator, values = objective(*answer_RT, microbatch.batch, target_T[microbatch.source_T])
        counts = {"denominator": denominator, "num_tokens": microbatch.batch.mask_T.sum()}
        # detached now: a pipeline schedule empties the loss itself once it has handed it on
        rows.append({name: value.detach().to(torch.float64) for name, value in {"loss": loss, **counts, **values}.items()})
        # an objective that looked at no token need not touch the graph; the backward pass must run all the same
        return loss if loss.requires_grad else loss + 0.0 * output_RN.sum(), denominator.to(torch.int) * is_counted, {}

    _run(chunks, microbatches, loss_func, forward_only=False)
    if not rows:
        return Sums()
    # one copy to the host for everything
    table = torch.stack([torch.stack(list(row.values())) for row in rows]).tolist()
    measured = [dict(zip(rows[0], line, strict=True)) for line in table]
    return add(Sums(row.pop("loss"), int(row.pop("denominator")), int(row.pop("num_tokens")), row) for row in measured)


def whole_responses(answer: Tensor, groups: Groups) -> Tensor:
    """Answers of this context-parallel rank, 0 on the others' tokens, with the others' filled in. Collective over cp.

    Each token is answered by one rank, so the sum is exact, and all ranks have the same bits. Its gradient is that of this rank's
    own loss: every rank computes the loss anew, and the gradients of the weights are summed over cp.
    Shapes: [..., T] -> the same
    """
    return answer if groups.cp_size == 1 else _SumOverContext.apply(answer, groups.cp)


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, answer: Tensor, cp: dist.ProcessGroup) -> Tensor:
        answer = answer.clone(memory_format=torch.contiguous_format)  # gloo garbles what is not
        dist.all_reduce(answer, group=cp)
        return answer

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


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
