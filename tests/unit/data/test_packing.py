"""Packing: what lands on which rank, in which optimiser step and in which forward pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.packing import (
    assign_ranks,
    balance,
    pack_groups,
    select,
    split_microbatches,
    split_minibatches,
    token_index,
)
from megatron_rpp.errors import ConfigError, DataError
from megatron_rpp.types import PackedBatch

from .builders import make_groups

LENGTHS = st.lists(st.integers(1, 60), max_size=24)


def sequences_of(batch: PackedBatch) -> list[tuple]:
    """Each sequence of a batch with everything that belongs to it, as plain values."""
    return [
        (
            tuple(batch.tokens_T[start:end].tolist()),
            tuple(batch.mask_T[start:end].tolist()),
            tuple(batch.logp_rollout_T[start:end].tolist()),
            batch.score_S[place].item(),
            batch.group_S[place].item(),
            batch.version_S[place].item(),
            batch.is_truncated_S[place].item(),
        )
        for place, (start, end) in enumerate(pairwise(batch.cu_len_S1.tolist()))
    ]


def test_one_rank_holds_every_token_mask_and_log_probability_in_order() -> None:
    """Two prompts of two tokens (0 1 and 100 101), responses of 1, 2 and 1 tokens."""
    batch = pack_groups(make_groups([[1, 2], [1]]), 0, 1)
    assert batch.tokens_T.tolist() == [0, 1, 10000, 0, 1, 11000, 11001, 100, 101, 10100]
    assert batch.cu_len_S1.tolist() == [0, 3, 7, 10]
    assert batch.mask_T.tolist() == [False, False, True, False, False, True, True, False, False, True]
    assert batch.logp_rollout_T.tolist() == pytest.approx([0, 0, -0.030, 0, 0, -0.033, -0.034, 0, 0, -0.130])
    assert batch.score_S.tolist() == [0.0, 0.5, 0.0]
    assert batch.group_S.tolist() == [0, 0, 1]
    assert batch.version_S.tolist() == [7, 7, 7]
    assert batch.is_truncated_S.tolist() == [True, False, True]
    kinds = [batch.tokens_T, batch.cu_len_S1, batch.logp_rollout_T, batch.score_S, batch.group_S, batch.version_S]
    assert [value.dtype for value in kinds] == [torch.int64, torch.int32, torch.float32, torch.float64, torch.int64, torch.int64]


@settings(max_examples=40, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=8), st.integers(1, 7), st.integers(1, 3))
def test_the_ranks_together_hold_every_response_once_whatever_the_layout(
    lengths: list[list[int]], dp_size: int, num_minibatches: int
) -> None:
    groups = make_groups(lengths)
    num_minibatches = min(num_minibatches, len(groups))
    whole = sequences_of(pack_groups(groups, 0, 1))
    parts = [sequences_of(pack_groups(groups, rank, dp_size, num_minibatches=num_minibatches)) for rank in range(dp_size)]
    assert sorted(sequence for part in parts for sequence in part) == sorted(whole)
    for part in parts:
        assert part == [sequence for sequence in whole if sequence in part]  # global order is kept on a rank


@settings(max_examples=40, deadline=None)
@given(st.lists(LENGTHS, min_size=3, max_size=8))
def test_an_optimiser_step_sees_the_same_sequences_for_every_number_of_ranks(lengths: list[list[int]]) -> None:
    groups = make_groups(lengths)
    seen = []
    for dp_size in (1, 2, 5):
        steps: list[list[tuple]] = [[], [], []]
        for rank in range(dp_size):
            batch = pack_groups(groups, rank, dp_size, num_minibatches=3)
            for step, sequences in zip(steps, split_minibatches(batch.group_S, 3), strict=True):
                step += sequences_of(select(batch, sequences))
        seen.append([sorted(step) for step in steps])
    assert seen[0] == seen[1] == seen[2]


@given(LENGTHS, st.integers(1, 9))
def test_balanced_shares_differ_by_at_most_the_longest_item(lengths: list[int], num_shares: int) -> None:
    shares = balance(lengths, num_shares)
    assert sorted(item for share in shares for item in share) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def best_heaviest(lengths: list[int], num_shares: int) -> int:
    """Slow oracle: the lightest possible heaviest share, over every assignment."""
    assignments = product(range(num_shares), repeat=len(lengths))
    return min(
        max(sum(n for n, share in zip(lengths, choice, strict=True) if share == wanted) for wanted in range(num_shares))
        for choice in assignments
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_the_heaviest_share_is_within_a_third_of_the_best_possible(lengths: list[int], num_shares: int) -> None:
    heaviest = max(sum(lengths[item] for item in share) for share in balance(lengths, num_shares))
    assert heaviest <= 4 / 3 * best_heaviest(lengths, num_shares)


def test_balance_by_hand() -> None:
    """9 and 7 open two shares; 6 joins 7 (13), 5 joins 9 (14), 4 joins 13 (17), 3 joins 14 (17)."""
    assert balance([3, 9, 4, 7, 5, 6], 2) == ((0, 1, 4), (2, 3, 5))


@settings(max_examples=60, deadline=None)
@given(st.lists(LENGTHS, min_size=3, max_size=6), st.integers(1, 4))
def test_tokens_are_balanced_over_ranks_inside_every_minibatch(lengths: list[list[int]], dp_size: int) -> None:
    groups = make_groups(lengths)
    owners = iter(assign_ranks(groups, dp_size, num_minibatches=3))
    loads = [[0] * dp_size for _ in range(3)]
    longest = [0] * 3
    for number, group in enumerate(groups):
        for response in group.responses:
            length = len(group.prompt.tokens) + len(response.tokens)
            loads[number % 3][next(owners)] += length
            longest[number % 3] = max(longest[number % 3], length)
    assert all(max(load) - min(load) <= most for load, most in zip(loads, longest, strict=True))


def test_groups_are_dealt_round_to_the_minibatches_in_prompt_order() -> None:
    assert split_minibatches(torch.tensor([0, 0, 1, 2, 2, 4]), 2) == ((0, 1, 3, 4, 5), (2,))


def test_more_ranks_than_responses_gives_valid_empty_batches() -> None:
    batches = [pack_groups(make_groups([[4]]), rank, 3) for rank in range(3)]
    assert [batch.num_sequences for batch in batches] == [1, 0, 0]
    empty = batches[2]
    assert empty.cu_len_S1.tolist() == [0]
    assert empty.num_tokens == 0
    assert split_minibatches(empty.group_S, 2) == ((), ())
    assert split_microbatches(empty.cu_len_S1, 8) == ()
    assert select(empty, ()).num_sequences == 0


def test_a_response_that_ended_at_once_keeps_its_place() -> None:
    batch = pack_groups(make_groups([[0, 2]]), 0, 1)
    assert batch.cu_len_S1.tolist() == [0, 2, 6]
    assert batch.score_S.tolist() == [0.0, 0.5]


@given(LENGTHS, st.integers(1, 80), st.integers(0, 6), st.integers(1, 4))
def test_microbatches_hold_each_sequence_once_and_fit(lengths: list[int], max_tokens: int, at_least: int, multiple_of: int) -> None:
    cu_len_S1 = torch.tensor([0, *lengths]).cumsum(0)
    parts = split_microbatches(cu_len_S1, max_tokens, at_least=at_least, multiple_of=multiple_of)
    assert sorted(sequence for part in parts for sequence in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(lengths[sequence] for sequence in part) <= max_tokens
    assert len(parts) >= at_least
    assert len(parts) % multiple_of == 0


def test_microbatches_are_few_and_even() -> None:
    """24 tokens in passes of at most 10: three passes of 8, not 10 + 10 + 4."""
    parts = split_microbatches(torch.tensor([0, 5, 10, 15, 18, 21, 24]), 10)
    assert sorted(sum([5, 5, 5, 3, 3, 3][sequence] for sequence in part) for part in parts) == [8, 8, 8]


def test_a_sequence_longer_than_the_limit_stands_alone() -> None:
    assert split_microbatches(torch.tensor([0, 3, 23, 26]), 10) == ((0, 2), (1,))


def test_surplus_microbatches_are_empty_and_last() -> None:
    assert split_microbatches(torch.tensor([0, 3, 6]), 10, at_least=3) == ((0,), (1,), ())
    assert split_microbatches(torch.tensor([0, 3]), 10, multiple_of=4) == ((0,), (), (), ())


def test_select_takes_whole_sequences_with_all_their_values() -> None:
    batch = pack_groups(make_groups([[1, 2], [3]]), 0, 1)
    batch = batch.with_logp(old=torch.arange(12.0), ref=torch.arange(12.0) + 100)
    part = select(batch, (2, 0))
    assert sequences_of(part) == [sequences_of(batch)[2], sequences_of(batch)[0]]
    assert part.logp_old_T.tolist() == [7, 8, 9, 10, 11, 0, 1, 2]
    assert part.logp_ref_T.tolist() == [107, 108, 109, 110, 111, 100, 101, 102]
    advantage_T = torch.arange(12) * 10
    assert advantage_T[token_index(batch.cu_len_S1, (2, 0))].tolist() == [70, 80, 90, 100, 110, 0, 10, 20]


def test_a_response_without_a_score_is_refused_by_name() -> None:
    (group,) = make_groups([[1, 1]])
    unscored = replace(group, responses=(group.responses[0], replace(group.responses[1], score=None)))
    with pytest.raises(DataError, match="response p0/1: it has no score"):
        pack_groups((unscored,), 0, 1)


def test_a_response_in_the_wrong_group_is_refused() -> None:
    one, other = make_groups([[1], [1]])
    with pytest.raises(DataError, match="it answers prompt p1"):
        pack_groups((replace(one, responses=other.responses),), 0, 1)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="prompt has no token"):
        pack_groups((replace(group := make_groups([[1]])[0], prompt=replace(group.prompt, tokens=())),), 0, 1)


def test_more_minibatches_than_groups_is_a_config_error_on_every_rank() -> None:
    for rank in range(2):
        with pytest.raises(ConfigError, match=r"algo\.minibatches: 3 minibatches cannot be cut from 2 groups"):
            pack_groups(make_groups([[1], [1]]), rank, 2, num_minibatches=3)


def test_a_rank_outside_the_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="dp_rank must lie in"):
        pack_groups(make_groups([[1]]), 2, 2)
