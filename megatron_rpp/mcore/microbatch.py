"""One forward pass's worth of sequences in the form Megatron takes: packed, padded, shifted, and cut for context parallelism.

Shape letters: T tokens of the micro-batch (real ones), T_local positions this context-parallel rank runs (padding included),
N asked tokens, S sequences, S1 = S + 1.

Each sequence is laid out in order. With context parallelism over C ranks a sequence is padded to a multiple of 2C and cut into
2C pieces; rank r holds pieces r and 2C-1-r, so that causal attention costs every rank the same. What is still missing to the
multiple that sequence parallelism needs is one more sequence of padding at the end, which attends to itself alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch import distributed as dist

from megatron_rpp.data.packing import select, split_microbatches, token_index
from megatron_rpp.dist.groups import Groups
from megatron_rpp.mcore.logp_model import LogpQuery
from megatron_rpp.types import PackedBatch


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward pass reads, and where its answers belong.

    batch: its sequences, whole and unpadded, on every context-parallel rank. answer_N: index into batch.tokens_T of each token that
    this rank answers. source_T: index of each of its tokens in the batch that it was cut from.
    """

    tokens_1T: Tensor
    position_1T: Tensor
    packed_seq_params: PackedSeqParams
    query: LogpQuery
    batch: PackedBatch
    answer_N: Tensor
    source_T: Tensor

    def spread(self, values_RN: Tensor) -> Tensor:
        """Rows of [N] answers as [T]: 0 on tokens that were not asked for. Differentiable."""
        return values_RN.new_zeros(len(values_RN), self.batch.num_tokens).index_copy(1, self.answer_N, values_RN)


@dataclass(frozen=True, slots=True)
class Packing:
    """How this rank's layout wants micro-batches cut. max_tokens: packed tokens of one forward pass. is_count_shared: the ranks
    of a stage exchange tokens in every layer, so that all of dp must run the same number of passes (expert parallelism)."""

    groups: Groups
    device: torch.device
    max_tokens: int
    vpp: int
    sequence_parallel: bool
    is_count_shared: bool = False

    def microbatches(self, batch: PackedBatch, temperature: float) -> list[Microbatch]:
        """Cut a batch. At least one micro-batch, even of nothing, so that a rank without a sequence still meets its peers.

        Ranks of different dp need not agree on the count where they meet only after the last one; where experts are shared they
        take the largest, and this is collective over dp. The interleaved schedule wants a multiple of the pipeline's length.
        What is missing is filled with empty micro-batches.
        """
        pp = self.groups.pp_size
        # a pipeline idles for pp - 1 of (pp - 1 + micro-batches) turns
        at_least = min(4 * pp, max(1, batch.num_sequences)) if pp > 1 else 1
        cut = partial(split_microbatches, batch.cu_len_S1, self.max_tokens, multiple_of=pp if self.vpp > 1 else 1)
        parts = cut(at_least=at_least)
        if self.is_count_shared:
            parts = cut(at_least=self._largest(len(parts)))
        return [self._microbatch(batch, part, temperature) for part in parts]

    def _largest(self, count: int) -> int:
        counts = torch.tensor([count], device=self.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.groups.dp)
        return int(counts)

    def _microbatch(self, batch: PackedBatch, sequences: tuple[int, ...], temperature: float) -> Microbatch:
        part = select(batch, sequences)
        layout = _lay_out(torch.diff(part.cu_len_S1).to(torch.int64), self.groups, self._multiple)
        position_N, answer_N = layout.asked(part.mask_T)
        return Microbatch(
            tokens_1T=layout.place(part.tokens_T)[None].to(self.device),
            position_1T=layout.position_L[None].to(self.device),
            packed_seq_params=layout.packed_seq_params(self.device),
            query=LogpQuery(position_N.to(self.device), part.tokens_T[answer_N].to(self.device), temperature),
            batch=_to(part, self.device),
            answer_N=answer_N.to(self.device),
            source_T=token_index(batch.cu_len_S1, sequences).to(self.device),
        )

    @property
    def _multiple(self) -> int:
        """What the number of positions of one rank must be a multiple of."""
        return self.groups.tp_size if self.sequence_parallel else 1


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each of this rank's L positions stands: in which sequence, at which place of it, and which token it holds.

    len_S and padded_len_S count the closing sequence of padding, where there is one, as a sequence of no tokens.
    index_L: index in T of the token, meaningful where position_L is inside its sequence.
    """

    len_S: Tensor
    padded_len_S: Tensor
    sequence_L: Tensor
    position_L: Tensor
    index_L: Tensor

    def place(self, tokens_T: Tensor) -> Tensor:
        """[L] tokens in this order, 0 on padding."""
        is_real_L = self.position_L < self.len_S[self.sequence_L]
        placed_L = tokens_T.new_zeros(len(self.position_L))
        placed_L[is_real_L] = tokens_T[self.index_L[is_real_L]]
        return placed_L

    def asked(self, mask_T: Tensor) -> tuple[Tensor, Tensor]:
        """Positions whose next token of the same sequence is in the mask, and the index in T of that next token."""
        position = (self.position_L + 1 < self.len_S[self.sequence_L]).nonzero()[:, 0]
        following = self.index_L[position] + 1
        is_asked = mask_T[following]
        return position[is_asked], following[is_asked]

    def packed_seq_params(self, device: torch.device) -> PackedSeqParams:
        cu_len = torch.cat([self.padded_len_S.new_zeros(1), self.padded_len_S.cumsum(0)]).to(device, torch.int32)
        longest = int(self.padded_len_S.max())
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_len, cu_seqlens_kv=cu_len, max_seqlen_q=longest, max_seqlen_kv=longest)


def _lay_out(len_S: Tensor, groups: Groups, multiple: int) -> _Layout:
    """The positions of this rank, with the padding that context parallelism and `multiple` ask for."""
    cp, cp_rank = groups.cp_size, groups.coords.cp
    pieces = 2 * cp if cp > 1 else 1
    padded_len_S = -(-len_S // pieces) * pieces
    local = int(padded_len_S.sum()) // cp
    step = math.lcm(multiple, 2) if cp > 1 else multiple  # with cp, a rank's part of a sequence is two pieces
    length = max(-(-local // step) * step, step)  # never nothing: empty tensors take paths of their own in attention kernels
    if length > local:
        len_S = torch.cat([len_S, len_S.new_zeros(1)])
        padded_len_S = torch.cat([padded_len_S, padded_len_S.new_tensor([(length - local) * cp])])
    local_len_S = padded_len_S // cp
    sequence_L = torch.repeat_interleave(torch.arange(len(local_len_S)), local_len_S)
    position_L = torch.arange(length) - (local_len_S.cumsum(0) - local_len_S)[sequence_L]
    if cp > 1:
        piece_L = (padded_len_S // pieces)[sequence_L]
        first_L, second_L = position_L + cp_rank * piece_L, position_L + (2 * cp - 2 - cp_rank) * piece_L
        position_L = torch.where(position_L < piece_L, first_L, second_L)
    index_L = (len_S.cumsum(0) - len_S)[sequence_L] + position_L
    return _Layout(len_S, padded_len_S, sequence_L, position_L, index_L)


def _to(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if batch.tokens_T.device == device:
        return batch
    moved = {name: value.to(device) for name in batch.__slots__ if isinstance(value := getattr(batch, name), Tensor)}
    return replace(batch, **moved)
