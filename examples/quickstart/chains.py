"""The quickstart's problem: chains of small additions and subtractions, and two ways to answer them.

"7+2-6+5=" can be answered with the steps written out, one easy fact each, or at once. The warm-up corpus holds both, all of
them right, the bare answer more often. A small model learns the steps, but the whole sum is too much for one token: after the
warm-up it prefers the bare answer and mostly gets it wrong. The two part at their first token, so that reinforcement learning
has a choice to shift. Accuracy and response length rise together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MIN_TERMS, MAX_TERMS = 4, 5
MAX_TERM, MAX_TOTAL = 9, 9  # every running total stays in [0, MAX_TOTAL]: few facts, learnt in a few hundred steps
WORKED_FRAC = 0.4  # of the warm-up corpus; the others are bare
STEPS, COMMA, STOP, ANSWER = "Steps: ", ", ", ". ", "Answer: "  # one token each in the quickstart's tokenizer


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
        left = (self.first, *self.totals)
        steps = [f"{before}{operator}{term}={after}" for before, (operator, term), after in zip(left, self.rest, self.totals, strict=False)]
        return f"{STEPS}{COMMA.join(steps)}{STOP}{self.bare}"

    @property
    def bare(self) -> str:
        return f"{ANSWER}{self.answer}"


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


def draw_different(rng: random.Random, count: int, taken: set[str]) -> list[Chain]:
    """`count` chains that differ from each other and from every prompt in `taken`, which they then join."""
    chains = []
    while len(chains) < count:
        chain = draw(rng)
        if chain.prompt not in taken:
            taken.add(chain.prompt)
            chains.append(chain)
    return chains
