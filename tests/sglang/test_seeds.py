"""Seeds of requests."""

from __future__ import annotations

import itertools

from megatron_rpp.rollout.seeds import request_seed


def test_a_seed_is_fixed_for_ever() -> None:
    """blake2b of "7\\x1f3\\x1fabc\\x1f1", 8 bytes, person rpp-rollout, shifted right by one; a change breaks resumed runs."""
    assert request_seed(7, 3, "abc", 1) == 2546485279713351892


def test_every_part_of_the_key_matters_and_parts_do_not_run_together() -> None:
    keys = itertools.product((0, 1, 11), (0, 1, 11), ("1", "11", ""), (0, 1, 11))
    assert len({request_seed(*key) for key in keys}) == 81


def test_seeds_fill_the_63_bits_that_sglang_takes() -> None:
    seeds = [request_seed(0, 0, "p", sample) for sample in range(4096)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        assert 1800 < sum(seed >> bit & 1 for seed in seeds) < 2300
