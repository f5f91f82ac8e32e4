"""No checkpoint runs code or ends in a traceback: a payload in every place that is unpickled, and damage
from seeds.

The whole number of damaged checkpoints is run by hand: `python -m tests.mcore.damaged 250`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks
from tests.mcore import damaged
from tests.mcore.damaged_run import Outcome, attack

SEEDS = list(range(44))  # four of each kind of damage; all are resumed from, one in four is opened in the other ways too


@pytest.fixture(scope="module")
def attacked(hf_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Outcome], list[str]]:
    """What became of each checkpoint, all in one Megatron rank."""
    arguments = (hf_root / "qwen2", tmp_path_factory.mktemp("attacked"), SEEDS, list(damaged.PLACES), True)
    return run_ranks(1, attack, *arguments, init=False, timeout_s=300.0)[0]


@pytest.mark.parametrize("place", damaged.PLACES)
def test_a_payload_is_refused_wherever_it_lies_and_never_runs(place: str, attacked: tuple[list[Outcome], list[str]]) -> None:
    """files.json agrees with the files.

    A start and a tool leave alone what only a resume needs; a tool opens no objects.
    """
    ways = {one.way: one for one in attacked[0] if one.what == f"{place} {place}"}
    unopened = {"start": damaged.OF_A_RESUME, "verify": (*damaged.OF_A_RESUME, *(name for name in damaged.PLACES if "object" in name))}
    for way, one in ways.items():
        expected = "loaded" if place in unopened.get(way, ()) else "refused"
        assert one.outcome == expected, f"{one.way}: {one.outcome}\n{one.message}"
        is_named = not any(words in place for words in ("first format", "protocol 0", "without the other"))
        if expected == "refused" and is_named:
            assert "a pickle in it names an object that is not data" in one.message and "got: posix.mkdir" in one.message, one.message
            assert f"step-{4:06d}" in one.message
    assert ways.keys() == {"resume", "start", "verify"}


def test_a_damaged_checkpoint_is_refused_in_words_or_loads(attacked: tuple[list[Outcome], list[str]]) -> None:
    found = [one for one in attacked[0] if one.what[0].isdigit()]
    assert {one.what.partition(" ")[0] for one in found if one.way == "resume"} == set(map(str, SEEDS))
    bad = [f"{one.way} {one.outcome}: {one.what}\n{one.message}" for one in found if one.outcome not in ("refused", "loaded")]
    assert bad == [], "\n".join(bad)
    refused = [one for one in found if one.outcome == "refused"]
    assert len(refused) > len(SEEDS) // 2, "the damage does not reach anything"
    assert all("Traceback" not in one.message and len(one.message) < 4000 for one in refused)


def test_memory_stays_and_a_clean_checkpoint_still_loads_to_the_bit(attacked: tuple[list[Outcome], list[str]]) -> None:
    assert attacked[1] == []
