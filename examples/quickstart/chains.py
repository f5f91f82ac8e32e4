"""The quickstart's problem: chains of small additions and subtractions, and two ways to answer them.

"7+2-6+5=" can be answered with the steps written out, one easy fact each, or at once. The warm-up corpus holds both, all of
them right, the bare answer more often. A small model learns the steps, but the whole sum is too much for one token: after the
warm-up it prefers the bare answer and mostly gets it wrong. The two part at their first token, so that reinforcement learning
has a choice to shift. Accuracy and response length rise together.

The hard family, for comparisons: longer chains of sums modulo 10, worked out in most rows, and a warm-up corpus with mistakes
in it. Half of its facts have a slip: one wrong result, which the worked solutions write at a rate of the fact's own and then go
on from. The warm-up learns the mistakes and their rates. Reinforcement learning is told of the last number alone, and has to
find out fact by fact which result is right; where the rate is high, it rarely sees it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_TERMS, MAX_TERMS = 4, 5
MAX_TERM, MAX_TOTAL = 9, 9  # every running total stays in [0, MAX_TOTAL]: few facts, learnt in a few hundred steps
WORKED_FRAC = 0.4  # of the warm-up corpus; the others are bare
HARD_MIN_TERMS, HARD_MAX_TERMS = 5, 7
HARD_MAX_TERM = 5
HARD_MODULUS = MAX_TOTAL + 1  # totals wrap around: a fact for every total, operator and term, 100 in all
HARD_WORKED_FRAC = 0.8
SLIPPING_FRAC = 0.5  # of the facts
MIN_SLIP_RATE, MAX_SLIP_RATE = 0.3, 0.9  # never 1: what is not sampled cannot be learnt
STEPS, COMMA, STOP, ANSWER = "Steps: ", ", ", ". ", "Answer: "  # one token each in the quickstart's tokenizer


Fact = tuple[int, str, int]  # total, operator, term
Slips = dict[Fact, tuple[int, float]]  # a wrong result, and how often the corpus writes it


@dataclass(frozen=True, slots=True)
class Chain:
    """first, then (operator, term) pairs. totals: the running total after each of them."""

    first: int
    rest: tuple[tuple[str, int], ...]
    totals: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{self.first}" + "".join(f"{operator}{term}" for operator, term in self.rest) + "="

    @property
    def answer(self) -> int:
        return self.totals[-1]

    @property
    def worked(self) -> str:
        """Every step, then the answer: "Steps: 7+2=9, 9-6=3, 3+5=8. Answer: 8"."""
        return self.written(self.totals)

    @property
    def bare(self) -> str:
        return f"{ANSWER}{self.answer}"

    def written(self, totals: Sequence[int]) -> str:
        """The worked form with these running totals, right or not."""
        left = (self.first, *totals)
        steps = [f"{before}{operator}{term}={after}" for before, (operator, term), after in zip(left, self.rest, totals, strict=False)]
        return f"{STEPS}{COMMA.join(steps)}{STOP}{ANSWER}{totals[-1]}"


def draw(rng: random.Random) -> Chain:
    while True:
        first = rng.randint(1, MAX_TERM)
        rest = tuple((rng.choice("+-"), rng.randint(1, MAX_TERM)) for _ in range(rng.randint(MIN_TERMS, MAX_TERMS) - 1))
        totals = []
        total = first
        for operator, term in rest:
            total = total + term if operator == "+" else total - term
            totals.append(total)
        if all(0 <= total <= MAX_TOTAL for total in totals):
            return Chain(first, rest, tuple(totals))


def draw_hard(rng: random.Random) -> Chain:
    first = rng.randint(0, MAX_TERM)
    rest = tuple((rng.choice("+-"), rng.randint(1, HARD_MAX_TERM)) for _ in range(rng.randint(HARD_MIN_TERMS, HARD_MAX_TERMS) - 1))
    steps = itertools.accumulate(rest, lambda total, step: wrapped(total, *step), initial=first)
    return Chain(first, rest, tuple(steps)[1:])


def wrapped(total: int, operator: str, term: int) -> int:
    return (total + term if operator == "+" else total - term) % HARD_MODULUS


def draw_slips(rng: random.Random) -> Slips:
    """Which facts the corpus gets wrong at times. The rates lie evenly between their bounds, so that seeds are equally hard."""
    facts = list(itertools.product(range(HARD_MODULUS), "+-", range(1, HARD_MAX_TERM + 1)))
    slipping = rng.sample(facts, round(SLIPPING_FRAC * len(facts)))
    step = (MAX_SLIP_RATE - MIN_SLIP_RATE) / (len(slipping) - 1)
    return {
        fact: ((wrapped(*fact) + rng.randint(1, HARD_MODULUS - 1)) % HARD_MODULUS, MIN_SLIP_RATE + number * step)
        for number, fact in enumerate(slipping)
    }


def with_slips(chain: Chain, slips: Slips, rng: random.Random) -> str:
    """The chain worked out by somebody who makes these mistakes, each at its rate."""
    totals, total = [], chain.first
    for operator, term in chain.rest:
        wrong, rate = slips.get((total, operator, term), (0, 0.0))
        total = wrong if rng.random() < rate else wrapped(total, operator, term)
        totals.append(total)
    return chain.written(totals)


def draw_different(rng: random.Random, count: int, taken: set[str], draw_one: Callable[[random.Random], Chain]) -> list[Chain]:
    """`count` chains that differ from each other and from every prompt in `taken`, which they then join."""
    chains = []
    while len(chains) < count:
        chain = draw_one(rng)
        if chain.prompt not in taken:
            taken.add(chain.prompt)
            chains.append(chain)
    return chains
