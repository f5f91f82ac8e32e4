"""The lossy wires: what a number loses, what that does to advantages, and that every rank reads the same."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.stats.wire import MAX_LIMBS, TOLERANCE, Wire, from_limbs, to_limbs
from tests.reference.properties import thorough
from tests.reference.statistics import whitened
from tests.unit.stats.batches import counted, in_pieces, responses, split
from tests.unit.stats.split import Response, over_ranks

seeds = st.integers(0, 2**64 - 1)
LIMBS = range(1, MAX_LIMBS + 1)


def _spread_numbers() -> torch.Tensor:
    """Of every size in [-1, 1], and the ends."""
    dice = torch.Generator().manual_seed(0)
    uniform = torch.rand(20_000, generator=dice, dtype=torch.float64) * 2 - 1
    small = uniform * torch.exp2(-40 * torch.rand(20_000, generator=dice, dtype=torch.float64))
    return torch.cat([uniform, small, torch.tensor([0.0, 1.0, -1.0, 2.0**-1074, 1 - 2.0**-53], dtype=torch.float64)])


@pytest.mark.parametrize("limbs", LIMBS)
def test_a_number_is_off_by_at_most_five_bits_a_limb_and_some_are_off_by_all_of_it(limbs: int) -> None:
    """17 / 32 lies halfway between two E4M3 numbers: 1 / 32 is left. 1 / 2 leaves to the next limb what lies beyond it."""
    number = _spread_numbers()
    assert (from_limbs(to_limbs(number, limbs)) - number).abs().max() <= 2.0 ** (-5 * limbs)
    worst = torch.tensor([sum(0.5 / 32**i for i in range(limbs - 1)) + 17 / 32**limbs], dtype=torch.float64)
    assert (from_limbs(to_limbs(worst, limbs)) - worst).abs().item() == 2.0 ** (-5 * limbs)


def test_one_limb_is_the_nearest_e4m3_number() -> None:
    """torch's own cast, of numbers that float32 holds, so that it rounds once. Ties go to the even one."""
    number = _spread_numbers().float()
    expected = (number * 256).to(torch.float8_e4m3fn)
    assert torch.equal(to_limbs(number.double(), 1).squeeze(-1), expected.view(torch.uint8))


def test_small_numbers_keep_relative_digits_down_to_the_end_of_e4m3() -> None:
    """Four bits a limb relative to the number itself: it is a float, and not a grid over the range."""
    number = torch.exp2(-7 * torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    for limbs in (1, 2, 3):
        error = (from_limbs(to_limbs(number, limbs)) - number).abs() / number
        assert error.max() <= 2.0 ** (-4 * limbs)


@pytest.mark.parametrize("limbs", [0, MAX_LIMBS + 1])
def test_a_number_of_limbs_that_cannot_be_is_refused(limbs: int) -> None:
    with pytest.raises(ValueError, match="limbs must be from 1 to 8"):
        Wire("fp8", limbs)


@cache  # one batch is asked for with several wires
def _whitened(values: tuple[float, ...], sequences: tuple[int, ...] | None) -> list[float]:
    return [float(value) for value in whitened(values, sequences)]


def _advantage_errors(ranks: list[list[Response]], wire: Wire, by_sequence: bool) -> tuple[float, float, int | None]:
    """The largest |adv' - adv| / max(|adv|, 1), the largest share of the stated bound that an error uses, and the limbs."""
    seen, agreement = over_ranks(ranks, wire=wire, by_sequence=by_sequence)
    values, sequences = counted([one for rank in ranks for one in rank])
    exact = _whitened(tuple(values), tuple(sequences) if by_sequence else None)
    stretch, shift = agreement.domains[0].bound(agreement.wire.rho)
    worst = used = 0.0
    for value, adv in zip(values, exact, strict=True):
        got = ((value - seen.mean) - seen.mean_tail) * seen.scale
        allowed = stretch * abs(adv) + shift + 1e-14 * max(abs(adv), 1)
        worst, used = max(worst, abs(got - adv) / max(abs(adv), 1)), max(used, abs(got - adv) / allowed)
    return worst, used, agreement.wire.limbs


def _over_ranks(seed: int, by_sequence: bool) -> list[list[Response]]:
    """A batch over ranks: whole responses, and in the token population half the time pieces."""
    dice = random.Random(seed)
    batch = responses(dice)
    return split(dice, batch) if by_sequence or seed % 2 else in_pieces(dice, batch)


@thorough
@given(seeds, st.booleans(), st.sampled_from([Wire("fp32"), *(Wire("fp8", limbs) for limbs in LIMBS)]))
def test_advantages_stay_within_the_stated_bound(seed: int, by_sequence: bool, wire: Wire) -> None:
    assert _advantage_errors(_over_ranks(seed, by_sequence), wire, by_sequence)[1] <= 1


@thorough
@given(seeds, st.booleans())
def test_by_default_there_are_limbs_enough_for_one_in_a_million(seed: int, by_sequence: bool) -> None:
    worst, _, limbs = _advantage_errors(_over_ranks(seed, by_sequence), Wire("fp8"), by_sequence)
    assert limbs in LIMBS
    assert worst <= TOLERANCE


def _gaussian(num_ranks: int, seed: int = 0) -> list[list[Response]]:
    dice = random.Random(seed)
    return [[Response(tuple(dice.gauss(0.3, 1) for _ in range(200)), (True,) * 200)] for _ in range(num_ranks)]


def test_the_bound_on_the_mean_is_not_loose() -> None:
    """-1 and 1 with the mean 17 / 32 (49 ones among 64), which one limb gets wrong by 1 / 32: 0.037 deviations. The bound says 0.044."""
    one = math.nextafter(1.0, 0.0)
    rank = [Response((one,) * 49 + (-one,) * 15, (True,) * 64)]
    seen, agreement = over_ranks([rank], wire=Wire("fp8", 1))
    error = abs(seen.mean - 34 / 64)
    assert error == pytest.approx(1 / 32, rel=1e-12)
    stretch, shift = agreement.domains[0].bound(agreement.wire.rho)
    assert 0.8 < error / math.sqrt(1 - (34 / 64) ** 2) / (shift / (1 + stretch)) <= 1


def test_the_bound_counts_what_the_ranks_means_do_to_the_variance() -> None:
    """Two ranks of equal values, 17 / 32 and its negative: no variance of their own is sent. One limb makes both 1 / 2, and the
    advantages 17 / 16 in place of 1."""
    ranks = [[Response((value,) * 4, (True,) * 4)] for value in (17 / 32, -17 / 32)]
    seen, agreement = over_ranks(ranks, wire=Wire("fp8", 1))
    assert (seen.mean, seen.std) == (0.0, 0.5)
    stretch, _ = agreement.domains[0].bound(agreement.wire.rho)
    assert 17 / 16 - 1 <= stretch < 3 / 16


def test_the_default_is_one_limb_too_many_at_most() -> None:
    """Each limb is worth five bits. The bound adds up worst cases, so it can be off by one of them, and not by two."""
    batches = [_gaussian(2, seed) for seed in range(40)]
    errors = [max(_advantage_errors(ranks, Wire("fp8", limbs), False)[0] for ranks in batches) for limbs in range(1, 6)]
    assert all(8 < before / after < 128 for before, after in zip(errors, errors[1:], strict=False)), errors
    chosen = {over_ranks(ranks, wire=Wire("fp8"))[0].limbs for ranks in batches}
    assert chosen == {5}
    assert errors[5 - 1] < TOLERANCE < errors[5 - 1 - 2]


def test_what_naive_fp8_costs() -> None:
    """One limb: percents. The default on the same ordinary batch is five limbs, and below 1e-6."""
    assert max(_advantage_errors(_gaussian(4, seed), Wire("fp8", 1), False)[0] for seed in range(10)) > 0.01
    worst, _, limbs = _advantage_errors(_gaussian(4), Wire("fp8"), False)
    assert limbs == 5
    assert worst < 1e-6


def test_an_outlier_takes_more_limbs_and_equal_values_take_one() -> None:
    """The range is what the numbers are relative to. 1 among 10^4 zeros: 1 is 100 deviations away."""
    rare = [[Response((1.0, *[0.0] * 5_000), (True,) * 5_001)], [Response((0.0,) * 5_000, (True,) * 5_000)]]
    worst, _, limbs = _advantage_errors(rare, Wire("fp8"), False)
    assert limbs == 6
    assert worst <= TOLERANCE
    equal = [[Response((0.7,), (True,))], [Response((0.7,), (True,))]]
    assert _advantage_errors(equal, Wire("fp8"), False) == (0.0, 0.0, 1)


@pytest.mark.parametrize("wire", [Wire("fp32"), Wire("fp8", 2)])
def test_the_order_of_ranks_does_not_matter_but_the_split_does(wire: Wire) -> None:
    """A number is rounded on the rank that sends it, so other splits round other numbers."""
    first, second, third = _gaussian(3)
    assert repr(over_ranks([first, second, third], wire=wire)[0]) == repr(over_ranks([third, first, second], wire=wire)[0])
    assert over_ranks([first, second + third], wire=wire)[0].mean != over_ranks([first + second, third], wire=wire)[0].mean


@pytest.mark.parametrize(("wire", "payload"), [(Wire(), 64), (Wire("fp32"), 8), (Wire("fp8", 1), 2), (Wire("fp8", 5), 10)])
def test_the_bytes_of_each_wire(wire: Wire, payload: int) -> None:
    assert over_ranks(_gaussian(2), wire=wire)[0].wire_bytes == 48 + payload


def test_values_whose_squares_float32_cannot_hold_travel_all_the_same() -> None:
    """The scale is shared, so only ratios are sent. 1e30 +- 1e20: a variance of 1e40."""
    ranks = [[Response((1e30 + 1e20, 1e30 - 1e20), (True, True))], [Response((1e30,), (True,))]]
    for wire in (Wire("fp32"), Wire("fp8")):
        assert _advantage_errors(ranks, wire, False)[0] < 1e-6
    assert math.isclose(over_ranks(ranks, wire=Wire("fp32"))[0].std, 1e20 * math.sqrt(2 / 3), rel_tol=1e-3)
