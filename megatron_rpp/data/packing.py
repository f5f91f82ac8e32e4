"""From groups of responses to flat packed batches, and from a batch to minibatches and microbatches.

Everything here is a pure function of its arguments: every rank calls it with the same groups and knows, without a
message, what every other rank holds. Two rules keep results independent of the layout:

- a sequence's minibatch depends on its group alone, never on dp, so that each optimiser step sees the same sequences
  whatever the number of ranks; dp shares are cut inside a minibatch,
- sequences keep their global order (group, then sample) on a rank and in every index list.

Shapes: T packed tokens, S sequences of this rank, S1 = S + 1 offsets.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_rpp.errors import ConfigError, DataError
from megatron_rpp.types import Group, PackedBatch, Prompt, Response

Indices = tuple[int, ...]


def balance(lengths: Sequence[int], num_shares: int) -> tuple[Indices, ...]:
    """Spread items over shares so that the longest share is nearly as short as can be.

    Longest item first, each to the share that is lightest so far (Graham's LPT rule). The heaviest share exceeds the
    lightest by at most the longest item, and the best possible heaviest share by at most a third. Ties go to the share
    with fewer items, then to the lower number, so that the answer depends on the lengths alone.

    Returns the item numbers of each share, ascending; a share may be empty.
    """
    if num_shares < 1:
        raise ValueError(f"num_shares must be at least 1, got {num_shares}")
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    lightest = [(0, 0, share) for share in range(num_shares)]  # (tokens, items, share): a heap from the start
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, items, share = lightest[0]
        shares[share].append(item)
        heapq.heapreplace(lightest, (tokens + lengths[item], items + 1, share))
    return tuple(tuple(sorted(share)) for share in shares)


def minibatch_of(group: int, num_minibatches: int) -> int:
    """The optimiser step, of `num_minibatches`, that a group's responses belong to: dealt round in prompt order."""
    return group % num_minibatches


def assign_ranks(groups: Sequence[Group], dp_size: int, *, num_minibatches: int = 1) -> tuple[int, ...]:
    """The dp rank of every response, in order (group, sample), balanced by tokens inside each minibatch."""
    if num_minibatches > max(1, len(groups)):
        raise ConfigError(
            f"{num_minibatches} minibatches cannot be cut from {len(groups)} groups",
            where="algo.minibatches",
            expected="at least one group of responses in every minibatch",
            fix="lower algo.minibatches or raise rollout.prompts_per_step",
        )
    group_of = [number for number, group in enumerate(groups) for _ in group.responses]
    lengths = [len(group.prompt.tokens) + len(response.tokens) for group in groups for response in group.responses]
    owners = [0] * len(lengths)
    for minibatch in range(num_minibatches):
        members = [item for item, group in enumerate(group_of) if minibatch_of(group, num_minibatches) == minibatch]
        for dp_rank, share in enumerate(balance([lengths[item] for item in members], dp_size)):
            for item in share:
                owners[members[item]] = dp_rank
    return tuple(owners)


def pack_groups(groups: Sequence[Group], dp_rank: int, dp_size: int, *, num_minibatches: int = 1) -> PackedBatch:
    """This dp rank's share of the responses as one flat batch.

    `groups` must be the same on every rank. group_S is the group's place in `groups`, domain_S that of its prompt's domain among
    the sorted domains of `groups`; hence both are equal on all ranks.
    With fewer responses than ranks some batches are empty; they are valid batches.

    Raises: DataError for a response without a score or a prompt without a token; ConfigError for more minibatches than groups.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank must lie in [0, {dp_size}), got {dp_rank}")
    owners = assign_ranks(groups, dp_size, num_minibatches=num_minibatches)
    items = [(number, group.prompt, response) for number, group in enumerate(groups) for response in group.responses]
    mine = [item for item, owner in zip(items, owners, strict=True) if owner == dp_rank]
    for _, prompt, response in mine:
        _check(prompt, response)
    lengths = [len(prompt.tokens) + len(response.tokens) for _, prompt, response in mine]
    number_of = {domain: number for number, domain in enumerate(sorted({group.prompt.domain for group in groups}))}
    return PackedBatch(
        tokens_T=torch.tensor([token for _, p, r in mine for token in (*p.tokens, *r.tokens)], dtype=torch.int64),
        cu_len_S1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        mask_T=torch.tensor([flag for _, p, r in mine for flag in [False] * len(p.tokens) + [True] * len(r.tokens)], dtype=torch.bool),
        logp_rollout_T=torch.tensor([logp for _, p, r in mine for logp in (*[0.0] * len(p.tokens), *r.logp_rollout)], dtype=torch.float32),
        score_S=torch.tensor([r.score for _, _, r in mine], dtype=torch.float64),
        group_S=torch.tensor([number for number, _, _ in mine], dtype=torch.int64),
        domain_S=torch.tensor([number_of[prompt.domain] for _, prompt, _ in mine], dtype=torch.int64),
        version_S=torch.tensor([r.version for _, _, r in mine], dtype=torch.int64),
        is_truncated_S=torch.tensor([r.is_truncated for _, _, r in mine], dtype=torch.bool),
    )


def _check(prompt: Prompt, response: Response) -> None:
    where = f"response {prompt.uid}/{response.sample}"
    if response.prompt_uid != prompt.uid:
        raise DataError(f"it answers prompt {response.prompt_uid}", where=where, expected="the prompt of its own group")
    if response.score is None:
        raise DataError("it has no score", where=where, expected="every response scored before packing")
    if not prompt.tokens:
        raise DataError("its prompt has no token", where=where, expected="a first token for the first log-probability to follow")


def split_minibatches(group_S: Tensor, num_minibatches: int) -> tuple[Indices, ...]:
    """The sequences of this rank in each optimiser step. A rank may have none in a step; it still takes part in it."""
    parts: list[list[int]] = [[] for _ in range(num_minibatches)]
    for sequence, group in enumerate(group_S.tolist()):
        parts[minibatch_of(group, num_minibatches)].append(sequence)
    return tuple(tuple(part) for part in parts)


def split_microbatches(cu_len_S1: Tensor, max_tokens: int, *, at_least: int = 0, multiple_of: int = 1) -> tuple[Indices, ...]:
    """Cut a batch into forward passes of at most `max_tokens` packed tokens, as even as can be.

    A sequence longer than `max_tokens` stands alone. The number of passes is the smallest one that fits, then raised to
    `at_least` and to a multiple of `multiple_of` (pipelines with virtual stages need it); passes beyond the number of
    sequences are empty tuples, at the end.
    """
    if max_tokens < 1 or multiple_of < 1:
        raise ValueError(f"max_tokens and multiple_of must be at least 1, got {max_tokens} and {multiple_of}")
    lengths = torch.diff(cu_len_S1).tolist()
    alone = [(sequence,) for sequence, length in enumerate(lengths) if length > max_tokens]
    rest = [sequence for sequence, length in enumerate(lengths) if length <= max_tokens]
    total = len(alone) + _smallest_count([lengths[sequence] for sequence in rest], max_tokens)
    total = -(-max(total, at_least) // multiple_of) * multiple_of
    parts = list(alone)
    if total > len(alone):
        shares = balance([lengths[sequence] for sequence in rest], total - len(alone))
        parts += [tuple(rest[item] for item in share) for share in shares]
    filled = sorted(part for part in parts if part)
    return tuple(filled) + ((),) * (total - len(filled))


def _smallest_count(lengths: Sequence[int], max_tokens: int) -> int:
    """The smallest number of shares, as `balance` cuts them, none of which holds more than max_tokens."""
    count = min(len(lengths), max(1, -(-sum(lengths) // max_tokens)))
    while count < len(lengths) and max(sum(lengths[item] for item in share) for share in balance(lengths, count)) > max_tokens:
        count += 1
    return count


def token_index(cu_len_S1: Tensor, sequences: Sequence[int]) -> Tensor:
    """Positions in T of the given sequences' tokens, in the order given: `adv_T[token_index(...)]` follows `select`."""
    spans = [torch.arange(int(cu_len_S1[sequence]), int(cu_len_S1[sequence + 1])) for sequence in sequences]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def select(batch: PackedBatch, sequences: Sequence[int]) -> PackedBatch:
    """The batch that holds only the given sequences, in the order given."""
    positions = token_index(batch.cu_len_S1, sequences).to(batch.tokens_T.device)
    picked = torch.tensor(sequences, dtype=torch.int64, device=batch.score_S.device)
    lengths = torch.diff(batch.cu_len_S1)[picked]
    index = {"_T": positions, "_S": picked}
    values = {name: getattr(batch, name) for name in batch.__slots__ if name[-2:] in index}
    chosen = {name: None if value is None else value[index[name[-2:]]] for name, value in values.items()}
    return PackedBatch(cu_len_S1=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32), **chosen)
