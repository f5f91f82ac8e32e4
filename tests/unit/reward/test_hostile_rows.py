"""A fixed share of the hostile rows. All 2,000 for each reward: `python -m tests.unit.reward.hostile_rows`."""

from __future__ import annotations

import pytest

from tests.unit.reward.hostile_rows import REWARDS, make_rows, run_through

NUM_ROWS = 150


@pytest.mark.parametrize("reward", REWARDS)
def test_every_hostile_row_gets_one_line_and_no_traceback(reward: str) -> None:
    counts = run_through(reward, make_rows(NUM_ROWS), limit_s=300)
    assert sum(counts.values()) == NUM_ROWS
    assert counts["bad row"] > 10
    assert counts["scored"] > 10


def test_the_table_holds_no_traceback_either() -> None:
    run_through("arithmetic", make_rows(NUM_ROWS, seed=12), limit_s=300, as_json=False)


def test_a_seed_makes_the_same_rows_again() -> None:
    assert make_rows(50) == make_rows(50) != make_rows(50, seed=1)
    assert b"" not in make_rows(50)
