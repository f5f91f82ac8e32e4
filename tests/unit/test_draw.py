"""Dynamic sampling: what is kept, what is drawn in its place, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.config.schema import Rollout
from megatron_rpp.data.prompts import PromptStream
from megatron_rpp.draw import Drawn, draw
from megatron_rpp.types import Group, Prompt, Response


def group(prompt: Prompt, *scores: float) -> Group:
    return Group(prompt, tuple(Response(prompt.uid, n, (1,), (0.0,), "", "stop", 0, score) for n, score in enumerate(scores)))


class World:
    """Prompts of which some are solved by all their responses, and a record of every roll-out."""

    def __init__(self, solved: Sequence[bool]) -> None:
        self.solved = {f"p{n}": is_solved for n, is_solved in enumerate(solved)}
        self.stream = PromptStream((Prompt(uid, (1,), uid, "") for uid in self.solved), seed=0)
        self.asked: list[tuple[str, ...]] = []

    def collect(self, prompts: Sequence[Prompt], refill: int) -> tuple[Group, ...]:
        assert refill == len(self.asked)
        self.asked.append(tuple(prompt.uid for prompt in prompts))
        return tuple(group(prompt, 1.0, 1.0 if self.solved[prompt.uid] else 0.0) for prompt in prompts)

    def draw(self, wanted: int, *, keep: str = "informative", max_refills: int = 3, least: int = 1) -> Drawn:
        return draw(self.stream, self.collect, Rollout(prompts_per_step=wanted, keep_groups=keep, max_refills=max_refills), least=least)


def test_a_step_without_dynamic_sampling_is_one_roll_out_and_keeps_everything() -> None:
    world = World([True] * 8)
    drawn = world.draw(4, keep="all")
    assert (len(drawn.kept), drawn.kept, drawn.refills, drawn.informative_frac) == (4, drawn.sampled, 0, 0.0)


def test_solved_prompts_are_replaced_until_the_step_is_full() -> None:
    world = World([n % 5 < 3 for n in range(200)])  # 60 % are solved
    drawn = world.draw(20, max_refills=5)
    assert len(drawn.kept) == 20
    assert not any(group.is_even for group in drawn.kept)
    assert 1 <= drawn.refills <= 5
    uids = [uid for roll_out in world.asked for uid in roll_out]
    assert len(uids) == len(set(uids)) == len(drawn.sampled)
    assert max(map(len, world.asked)) <= 20


def test_the_cap_ends_it_with_what_there_is() -> None:
    world = World([n % 10 > 0 for n in range(400)])  # nine of ten are solved
    drawn = world.draw(40, max_refills=2)
    assert (drawn.refills, len(world.asked)) == (2, 3)
    assert 0 < len(drawn.kept) < 40
    assert not any(group.is_even for group in drawn.kept)


def test_no_refill_at_all_is_a_cap_too() -> None:
    drawn = World([n % 2 > 0 for n in range(40)]).draw(20, max_refills=0)
    assert (drawn.refills, 0 < len(drawn.kept) < 20) == (0, True)


def test_where_nothing_is_informative_the_step_has_what_its_minibatches_need() -> None:
    drawn = World([True] * 50).draw(8, least=3)
    assert (len(drawn.kept), drawn.refills, drawn.informative_frac) == (3, 3, 0.0)
    assert drawn.kept == drawn.sampled[:3]


def test_a_prompt_is_not_drawn_twice_in_a_step_even_when_the_set_is_small() -> None:
    world = World([True] * 6)
    drawn = world.draw(4, max_refills=10)
    uids = [uid for roll_out in world.asked for uid in roll_out]
    assert sorted(uids) == sorted(set(uids))
    assert len(drawn.sampled) <= 6


@pytest.mark.parametrize("seed", range(40))
def test_an_epoch_that_ends_inside_a_step_neither_ends_its_refills_nor_loses_a_prompt(seed: int) -> None:
    """16 prompts, 8 a step, one of them solved: every second step begins at the end of an epoch."""
    world = World([n == 0 for n in range(16)])
    world.stream = PromptStream((Prompt(uid, (1,), uid, "") for uid in world.solved), seed=seed)
    drawn_so_far: list[str] = []
    for _ in range(6):
        world.asked.clear()
        drawn = world.draw(8)
        assert len(drawn.kept) == 8
        uids = [one.prompt.uid for one in drawn.sampled]
        assert len(uids) == len(set(uids))
        drawn_so_far += uids
    counts = [drawn_so_far.count(uid) for uid in world.solved]
    assert max(counts) - min(counts) <= 2


def test_a_greedy_response_that_scores_otherwise_makes_a_prompt_worth_keeping() -> None:
    prompt = Prompt("p", (1,), "", "")
    same, other = group(prompt, 1.0).responses[0], group(prompt, 0.0).responses[0]
    assert not Group(prompt, (same,), other).is_even
    assert Group(prompt, (same,), same).is_even


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.7, 0.7, 0.7), False),  # whatever the deviation of three equal floats comes to
        ((-1.0, -1.0, 1.0), True),  # a mean below 0, which a test of 0 < mean < 1 drops
        ((0.5, 0.5), False),  # a mean inside (0, 1), which it keeps
        ((1e-300, 2e-300), True),
    ],
)
def test_scores_differ_by_comparison_and_not_by_their_mean_or_deviation(scores: tuple[float, ...], expected: bool) -> None:
    assert group(Prompt("p", (1,), "", ""), *scores).is_even is not expected


@settings(max_examples=2000, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 4), st.integers(1, 4))
def test_whatever_is_solved_a_step_is_neither_too_large_nor_empty_and_keeps_the_order(
    solved: list[bool], wanted: int, max_refills: int, least: int
) -> None:
    world, wanted = World(solved), min(wanted, len(solved))
    drawn = world.draw(wanted, max_refills=max_refills, least=min(least, wanted))
    assert min(least, wanted) <= len(drawn.kept) <= wanted
    assert drawn.refills <= max_refills
    informative = [one for one in drawn.sampled if not one.is_even]
    assert list(drawn.kept[: len(informative)]) == informative[:wanted]
    if len(informative) >= wanted:
        assert not any(group.is_even for group in drawn.kept)
