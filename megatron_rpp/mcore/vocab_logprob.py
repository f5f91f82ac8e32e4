"""Log-probabilities of given tokens from hidden states and one shard of the vocabulary, without ever holding [T, V].

Shape letters: N tokens whose log-probability is wanted, D hidden size, V_tp rows of the output weight on this tensor-parallel
rank (padding rows included), C tokens of one chunk.

The output projection is part of the function, so that only [C, V_tp] logits exist at a time, forward and backward. Ranks meet
once, in one all-gather of three or four numbers a token. The backward pass meets nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

_CHUNK_ELEMENTS = 1 << 26  # float32 logits of one chunk: 256 MiB


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which token ids the rows of this rank's output weight stand for.

    start: id of row 0. num_valid: rows before the vocabulary's padding begins, 0 on a rank that holds padding only.
    group: the tensor-parallel process group, None where there is one shard.
    """

    start: int
    num_valid: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(cls, vocab_size: int, rows: int, tp_rank: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of `tp_rank` when every rank holds `rows` consecutive rows of a vocabulary of `vocab_size`."""
        start = tp_rank * rows
        return cls(start=start, num_valid=min(max(vocab_size - start, 0), rows), group=group)


def vocab_parallel_logp(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it is drawn from.

    logits = hidden @ weight.T / temperature, over the vocabulary without its padding rows
    logp[n] = logits[n, target[n]] - logsumexp(logits[n]);  entropy[n] = -sum_v p[n, v] * log p[n, v]

    The gradient for `hidden_ND` is this shard's part: whoever spread the hidden states over the ranks must sum it (Megatron's
    copy_to / gather_from region functions do). The gradient for `weight_VD` is whole; padding rows get exact zeros.
    The projection runs in the weight's own type, everything after it in float32 (float64 stays float64).

    Shapes: hidden_ND [N, D], weight_VD [V_tp, D], target_N [N] int64 -> logp [N], entropy [N]
    Source: log-softmax by its definition. Differs from Megatron's vocab_parallel_cross_entropy: chunked, padding excluded,
    temperature, entropy, and one all-gather where that one makes three all-reduces.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // max(1, weight_VD.shape[0]))
    return _VocabParallelLogp.apply(hidden_ND, weight_VD, target_N, shard, temperature, chunk_tokens)


class _VocabParallelLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, shard, temperature, chunk_tokens):
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.temperature, ctx.chunk_tokens = shard, temperature, chunk_tokens
        parts_4N = hidden_ND.new_empty((4, hidden_ND.shape[0]), dtype=_wide(hidden_ND))
        for span in _chunks(hidden_ND.shape[0], chunk_tokens):
            logits_CV = _logits(hidden_ND[span], weight_VD, shard, temperature)
            parts_4N[:, span] = _summarise(logits_CV, target_N[span] - shard.start)
        log_sum_N, target_logit_N, entropy_N = _merge(_gather(parts_4N, shard.group))
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, log_sum_N, entropy_N)
        return target_logit_N - log_sum_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, log_sum_N, entropy_N = ctx.saved_tensors
        shard, valid = ctx.shard, slice(0, ctx.shard.num_valid)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD))
        if grad_logp_N is None and grad_entropy_N is None:
            return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None, None
        for span in _chunks(hidden_ND.shape[0], ctx.chunk_tokens):
            # log p of every valid token of the chunk; nothing here depends on another rank any more
            logp_CV = _logits(hidden_ND[span], weight_VD, shard, ctx.temperature).sub_(log_sum_N[span, None])
            prob_CV = logp_CV.exp()
            grad_CV = torch.zeros_like(prob_CV)
            if grad_logp_N is not None:
                grad_CV.addcmul_(prob_CV, grad_logp_N[span, None], value=-1.0)
                _add_at_targets(grad_CV, target_N[span] - shard.start, grad_logp_N[span])
            if grad_entropy_N is not None:
                surprise_CV = logp_CV.add_(entropy_N[span, None]).mul_(prob_CV)
                grad_CV.addcmul_(surprise_CV, grad_entropy_N[span, None], value=-1.0)
            grad_CV = grad_CV.div_(ctx.temperature).to(weight_VD.dtype)
            grad_hidden_ND[span] = grad_CV @ weight_VD[valid]
            grad_weight_VD[valid] += grad_CV.t() @ hidden_ND[span]
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, num_tokens)) for start in range(0, num_tokens, chunk_tokens)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(hidden_CD: Tensor, weight_VD: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """[C, num_valid] logits at the given temperature, wide enough for a softmax. Padding rows never enter."""
    logits_CV = hidden_CD @ weight_VD[: shard.num_valid].t()
    return logits_CV.to(_wide(logits_CV)).div_(temperature)


def _summarise(logits_CV: Tensor, local_target_C: Tensor) -> Tensor:
    """What the other ranks need of a chunk, [4, C]: peak, sum of exp(logit - peak), sum of exp(x) * x with x = logit - peak, and
    the target's logit, 0 where another rank owns the target."""
    parts_4C = logits_CV.new_zeros((4, logits_CV.shape[0]))
    if logits_CV.shape[1] == 0:
        # finite, because the merge multiplies differences of peaks by sums that are 0 here
        parts_4C[0] = torch.finfo(logits_CV.dtype).min / 2
        return parts_4C
    parts_4C[0] = logits_CV.max(dim=-1).values
    is_mine_C = (local_target_C >= 0) & (local_target_C < logits_CV.shape[1])
    column_C = local_target_C.clamp(0, logits_CV.shape[1] - 1)
    parts_4C[3] = torch.where(is_mine_C, logits_CV.gather(1, column_C[:, None])[:, 0], 0.0)
    below_CV = logits_CV - parts_4C[0][:, None]
    weight_CV = below_CV.exp()
    parts_4C[1] = weight_CV.sum(dim=-1)
    parts_4C[2] = weight_CV.mul_(below_CV).sum(dim=-1)
    return parts_4C


def _gather(parts_4N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R, 4, N]: the parts of every shard, in rank order, so that all ranks merge the same numbers in the same order."""
    if group is None or group.size() == 1 or parts_4N.shape[1] == 0:
        return parts_4N[None]
    parts_R4N = parts_4N.new_empty((group.size(), *parts_4N.shape))
    dist.all_gather_into_tensor(parts_R4N.view(-1, parts_4N.shape[1]), parts_4N, group=group)
    return parts_R4N


def _merge(parts_R4N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logsumexp, target logit and entropy over all shards, each [N]."""
    peak_RN, sum_RN, sum_x_RN, target_RN = parts_R4N.unbind(1)
    peak_N = peak_RN.max(dim=0).values
    shift_RN = peak_RN - peak_N
    scale_RN = shift_RN.exp()
    sum_N = (sum_RN * scale_RN).sum(dim=0)
    sum_x_N = ((sum_x_RN + sum_RN * shift_RN) * scale_RN).sum(dim=0)
    return sum_N.log() + peak_N, target_RN.sum(dim=0), sum_N.log() - sum_x_N / sum_N


def _add_at_targets(grad_CV: Tensor, local_target_C: Tensor, grad_C: Tensor) -> None:
    """Add grad[c] at column target[c] of row c, on the rows whose target this rank owns. No host synchronisation."""
    if grad_CV.shape[1] == 0:
        return
    is_mine_C = (local_target_C >= 0) & (local_target_C < grad_CV.shape[1])
    column_C = local_target_C.clamp(0, grad_CV.shape[1] - 1)
    grad_CV.scatter_add_(1, column_C[:, None], torch.where(is_mine_C, grad_C, 0.0).to(grad_CV.dtype)[:, None])
