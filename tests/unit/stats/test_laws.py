"""What holds of the exact statistics for every batch, every split over ranks and every order. Values are compared bit for bit."""

from __future__ import annotations

import dataclasses
import random
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.stats.moments import Moments, whiten
from tests.reference.properties import thorough
from tests.reference.statistics import moments, relative_error, whitened
from tests.unit.stats.batches import counted, in_pieces, responses, split, zigzag
from tests.unit.stats.split import Response, over_ranks

seeds = st.integers(0, 2**64 - 1)
TINY = 2.0**-1050  # where float64 itself has few digits left, also once multiplied by the largest scale, 1e4


def _close(got: float, exact: Fraction, rel: float = 1e-15) -> bool:
    return abs(Fraction(got) - exact) <= Fraction(rel) * abs(exact) + Fraction(TINY)


@thorough
@given(seeds, st.booleans(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_any_split_order_and_packing_gives_the_same_bits_and_they_are_right(seed: int, by_sequence: bool, dtype: torch.dtype) -> None:
    """Against rational arithmetic: mean to 1e-15 of itself, variance to 1e-15, whatever else is in the batch."""
    dice = random.Random(seed)
    batch = [_stored(one, dtype) for one in responses(dice)]
    alone, _ = over_ranks([batch], by_sequence=by_sequence, dtype=dtype)
    spread, _ = over_ranks(split(dice, batch), by_sequence=by_sequence, dtype=dtype)
    assert repr(spread) == repr(alone)  # of floats the repr is the bits, the sign of a zero included
    values, sequences = counted(batch)
    mean, variance = moments(values, sequences if by_sequence else None)
    # Two values that cancel leave less than 2^-166 of themselves for others to be lost beside.
    lost = Fraction(max(map(abs, values))) / 2**165
    assert abs(Fraction(alone.mean) - mean) <= Fraction(1e-15) * abs(mean) + lost + Fraction(TINY)
    assert _close(alone.variance, variance)
    assert (alone.n, alone.min, alone.max) == (len(set(sequences)) if by_sequence else len(values), min(values), max(values))
    assert alone.wire_bytes == 48 + 64


def _stored(one: Response, dtype: torch.dtype) -> Response:
    """With values that the dtype holds, so that all agree what the values are; those beyond it are halved in size until they fit."""
    values = torch.tensor(one.values, dtype=torch.float64)
    limit = torch.finfo(dtype).max if dtype != torch.float64 else float("inf")
    fitting = torch.where(values.abs() > limit, values.sign() * 1e30, values)
    return dataclasses.replace(one, values=tuple(fitting.to(dtype).double().tolist()))


@thorough
@given(seeds)
def test_tokens_dealt_to_data_and_context_parallel_ranks_have_the_bits_of_whole_responses(seed: int) -> None:
    """In the token population. Pieces are often empty here, and so are whole ranks."""
    dice = random.Random(seed)
    batch = responses(dice, num_domains=2)
    num_domains = 1 + seed % 2
    dealt, _ = over_ranks(in_pieces(dice, batch), num_domains=num_domains)
    assert repr(dealt) == repr(over_ranks([batch], num_domains=num_domains)[0])


def test_megatrons_pieces_by_hand() -> None:
    """Eight tokens over two ranks: 01 and 67, 23 and 45. Five: pieces of two, the last but one short and the last empty."""
    places = [[[*piece] for piece in rank] for rank in zigzag(8, 2)]
    assert places == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]
    assert [[[*piece] for piece in rank] for rank in zigzag(5, 2)] == [[[0, 1], []], [[2, 3], [4]]]
    assert [[[*piece] for piece in rank] for rank in zigzag(0, 3)] == [[[], []]] * 3


def test_in_the_sample_population_a_piece_counts_as_a_response() -> None:
    """0 2 4 | 6 is 2 and 6: mean 4. Cut as 0 | 2 4 | 6, over ranks or on one, it is 0, 3 and 6: mean 3. So responses must be whole."""
    whole, pieces = Response((0.0, 2.0, 4.0), (True,) * 3), [Response((0.0,), (True,)), Response((2.0, 4.0), (True, True))]
    six = Response((6.0,), (True,))
    assert over_ranks([[whole], [six]], by_sequence=True)[0].mean == 4.0
    for ranks in ([[pieces[0]], [pieces[1], six]], [[*pieces, six]]):
        seen, _ = over_ranks(ranks, by_sequence=True)
        assert (seen.n, seen.mean) == (3, 3.0)


@thorough
@given(seeds, st.booleans(), st.integers(2, 4))
def test_a_batch_held_several_times_over_has_the_same_moments(seed: int, by_sequence: bool, times: int) -> None:
    """As on context-parallel ranks that all hold it."""
    dice = random.Random(seed)
    batch = responses(dice)
    once, _ = over_ranks([batch], by_sequence=by_sequence)
    often, _ = over_ranks(split(dice, batch * times), by_sequence=by_sequence)
    assert dataclasses.replace(often, n=once.n, domains=()) == dataclasses.replace(once, domains=())
    assert often.n == times * once.n


@thorough
@given(seeds, st.booleans(), st.integers(-60, 60), st.sampled_from([1.0, -1.0]))
def test_a_scaled_batch_has_scaled_moments(seed: int, by_sequence: bool, exponent: int, sign: float) -> None:
    """By a power of two and a sign, which no float rounds: then mean and variance follow bit for bit."""
    dice = random.Random(seed)
    batch = [one for one in responses(dice) if not _has_tiny(one)]
    factor = sign * 2.0**exponent
    scaled = [dataclasses.replace(one, values=tuple(value * factor for value in one.values)) for one in batch]
    if not any(any(one.mask) for one in batch):
        return
    before, _ = over_ranks([batch], by_sequence=by_sequence)
    after, _ = over_ranks(split(dice, scaled), by_sequence=by_sequence)
    assert after.mean == before.mean * factor
    assert after.variance == before.variance * factor * factor
    assert {after.min, after.max} == {before.min * factor, before.max * factor}


def _has_tiny(one: Response) -> bool:
    """So small that its square is not a normal number once it is scaled."""
    return any(0 < abs(value) < 1e-120 for value in one.values)


@thorough
@given(seeds, st.booleans(), st.booleans())
def test_whitened_values_are_right_to_the_last_digits(seed: int, by_sequence: bool, recentre: bool) -> None:
    """Each by itself, relative to its own size, to 1e-15: also 1e8 +- 1e-4, where half a step of the mean is 7e-5 deviations."""
    batch = responses(random.Random(seed))
    x_T = torch.tensor([value for one in batch for value in one.values], dtype=torch.float64)
    mask_T = torch.tensor([flag for one in batch for flag in one.mask])
    sequence_T = torch.tensor([number for number, one in enumerate(batch) for _ in one.values])
    population = "sample" if by_sequence else "token"
    out_T, _ = whiten(x_T, mask_T, sequence_T=sequence_T, group=None, population=population, recentre=recentre)
    values, sequences = counted(batch)
    expected = whitened(values, sequences if by_sequence else None, recentre=recentre)
    # An element is right relative to itself, or, where others cancelled in the mean, to 2^-160 of the largest.
    lost = max(map(abs, expected)) / 2**160 + Fraction(TINY)
    for got, exact in zip(out_T[mask_T].tolist(), expected, strict=True):
        assert abs(Fraction(got) - exact) <= Fraction(1e-15) * abs(exact) + lost, (relative_error(got, exact), got)
    assert out_T[~mask_T].tolist() == [0.0] * int((~mask_T).sum())


@thorough
@given(seeds, st.booleans(), st.floats(0.01, 100), st.floats(-1e4, 1e4))
def test_an_affine_map_of_the_values_changes_no_whitened_value(seed: int, by_sequence: bool, factor: float, offset: float) -> None:
    """As far as the mapped values themselves still hold them: each was rounded to 2^-53 of its size."""
    dice = random.Random(seed)
    x_T = torch.tensor([dice.gauss(0, 1) for _ in range(12)], dtype=torch.float64)
    arguments = {"sequence_T": torch.tensor([0] * 5 + [1] * 3 + [2] * 4), "group": None, "population": "sample" if by_sequence else "token"}
    before_T, seen = whiten(x_T, torch.ones(12, dtype=torch.bool), **arguments)
    mapped_T = x_T * factor + offset
    after_T, mapped = whiten(mapped_T, torch.ones(12, dtype=torch.bool), **arguments)
    rounding = 2.0**-52 * float(mapped_T.abs().max()) * mapped.scale
    assert (after_T - before_T).abs().max() <= 20 * rounding + 1e-14
    assert seen.variance > 1e-3  # so that the floor has no part in it


@thorough
@given(seeds, st.booleans())
def test_domains_are_measured_by_themselves_and_together(seed: int, by_sequence: bool) -> None:
    """Each domain as if it were alone, absent ones None; the whole as if there were none; on any split."""
    dice = random.Random(seed)
    batch = responses(dice, num_domains=3)
    seen, _ = over_ranks(split(dice, batch), by_sequence=by_sequence, num_domains=3)
    for number, one in enumerate(seen.domains):
        alone = [each for each in batch if each.domain == number]
        assert (one is None) == (not counted(alone)[0])
        if one is not None:
            assert one == over_ranks([alone], by_sequence=by_sequence)[0].domains[0]
    values, sequences = counted(batch)
    mean, variance = moments(values, sequences if by_sequence else None)
    assert isinstance(seen, Moments)
    assert _close(seen.variance, variance)
    assert abs(Fraction(seen.mean) - mean) <= Fraction(1e-15) * abs(mean) + Fraction(max(map(abs, values))) / 2**160 + Fraction(TINY)
    assert seen.wire_bytes == 48 * 3 + 64 * sum(one is not None for one in seen.domains)
