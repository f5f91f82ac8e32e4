"""Batches for property tests: responses of very different values, made from one number that hypothesis draws."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.unit.stats.split import Response

FLOAT32_07 = 0.699999988079071044921875
# What one batch's values look like.
KINDS: tuple[Callable[[random.Random], float], ...] = (
    lambda dice: dice.gauss(0, 1),
    lambda dice: 1e8 + dice.gauss(0, 1e-4),
    lambda dice: FLOAT32_07,
    lambda dice: dice.choice((1e30, -1e30, 1.0, dice.gauss(0, 1), 1e-9)),
    lambda dice: dice.choice((1e30, -1e30, 5e-324, 0.0, -0.0)),
    lambda dice: 5e-324 * dice.randrange(-9, 10),
    lambda dice: dice.choice((-1.0, 1.0)) * 10 ** dice.uniform(-120, 130),
    lambda dice: float(dice.randrange(-2, 3)),
    lambda dice: dice.choice((1000.0, *[dice.gauss(0, 1)] * 9)),
)


def responses(dice: random.Random, *, num_domains: int = 1) -> list[Response]:
    """One to six responses of zero to six tokens, masked anywhere; NaN or worse where they are not. At least one token counts."""
    draw = dice.choice(KINDS)
    found = []
    for number in range(dice.randrange(1, 7)):
        length = dice.randrange(1 if number == 0 else 0, 7)
        share = dice.choice((0.0, 0.5, 1.0)) if number else 1.0
        mask = tuple(dice.random() < share for _ in range(length))
        values = tuple(draw(dice) if flag else dice.choice((math.nan, math.inf, 1e300, 0.0)) for flag in mask)
        found.append(Response(values, mask, dice.randrange(num_domains)))
    return found


def split(dice: random.Random, batch: Sequence[Response]) -> list[list[Response]]:
    """Over one to four ranks, of which some may get none, in any order."""
    ranks: list[list[Response]] = [[] for _ in range(dice.randrange(1, 5))]
    for one in dice.sample(list(batch), len(batch)):
        dice.choice(ranks).append(one)
    return ranks


def zigzag(length: int, cp: int) -> list[list[range]]:
    """The places that each of cp ranks holds of a response: of 2 * cp pieces rank r has r and 2 * cp - 1 - r, as in Megatron. The
    last piece may be short, and pieces may be empty."""
    size = -(-length // (2 * cp))
    pieces = [range(min(i * size, length), min((i + 1) * size, length)) for i in range(2 * cp)]
    return [[pieces[r], pieces[2 * cp - 1 - r]] for r in range(cp)]


def dealt(dice: random.Random, lengths: Sequence[int], dp: int, cp: int) -> list[list[tuple[int, range]]]:
    """What each of dp * cp ranks holds: responses by number, in any order, and which of their places. Whole ones with cp 1."""
    ranks: list[list[tuple[int, range]]] = [[] for _ in range(dp * cp)]
    for number in dice.sample(range(len(lengths)), len(lengths)):
        first = cp * dice.randrange(dp)
        for r, pieces in enumerate(zigzag(lengths[number], cp) if cp > 1 else [[range(lengths[number])]]):
            ranks[first + r] += [(number, piece) for piece in pieces]
    return ranks


def cut(one: Response, places: range) -> Response:
    """A piece of a response, as if it were one."""
    return replace(one, values=one.values[places.start : places.stop], mask=one.mask[places.start : places.stop])


def in_pieces(dice: random.Random, batch: Sequence[Response]) -> list[list[Response]]:
    """Over one or two data-parallel ranks of two or more context-parallel ones each."""
    dp, cp = dice.choice(((1, 2), (1, 3), (1, 4), (2, 2)))
    return [[cut(batch[number], places) for number, places in rank] for rank in dealt(dice, [len(one.mask) for one in batch], dp, cp)]


def counted(batch: Sequence[Response]) -> tuple[list[float], list[int]]:
    """The values that count, and the number of the response of each."""
    pairs = [(value, i) for i, one in enumerate(batch) for value, flag in zip(one.values, one.mask, strict=True) if flag]
    return [value for value, _ in pairs], [number for _, number in pairs]
