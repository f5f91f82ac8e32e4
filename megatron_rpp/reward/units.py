"""What the words after a number say: a unit, a factor such as "million", or something that is no single number."""

from __future__ import annotations

import re

FACTORS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1_000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
    "trillion": 1_000_000_000_000,
}
# Words that add, multiply, deny, doubt or offer another value. None of them is a unit.
_NO_UNIT_WORDS = """
    or and nor not no never but maybe possibly perhaps probably if unless otherwise else except either neither instead
    is are was be isn may might could can would should about roughly almost nearly around actually rather
    wrong incorrect false true correct unknown
    more less fewer greater than over under times plus minus divided multiplied by to choose mod modulo base remainder
    squared cubed half halves third thirds quarter quarters fourths fifths sixths eighths tenths hundredths thousandths
    double twice triple factorial root power dozens hundreds thousands millions billions trillions
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""
_NO_UNITS = frozenset(_NO_UNIT_WORDS.split())
_FACTOR = re.compile(rf"[\s$]*(?:{'|'.join(FACTORS)})\b")
_MAX_WORDS = 4
_COMMAND = re.compile(r"\\[A-Za-z]+")
_EXPONENT = re.compile(r"\^ ?\{?-?[0-9]\}?")
_NO_UNIT_SIGNS = re.compile(r"[0-9,;:=!%?+*<>&|~#\"]|'(?![A-Za-z])")
_WORD = re.compile(r"[A-Za-z]+")
_WORDS_AFTER_NUMBER = re.compile(r"[-+]?[0-9][0-9.,]*\s+([A-Za-z].*)", re.DOTALL)


def factor_of(unit: str) -> int | None:
    """1 for a unit, 1,000,000 for "million dollars", None for words that are no unit."""
    text = _EXPONENT.sub(" ", _COMMAND.sub(" ", unit))
    words = [word.lower() for word in _WORD.findall(text)]
    if _NO_UNIT_SIGNS.search(text) or len(words) > _MAX_WORDS or not _NO_UNITS.isdisjoint(words):
        return None
    if not FACTORS.keys().isdisjoint(words[1:]):
        return None
    return FACTORS.get(words[0], 1) if words else 1


def begins_with_factor(rest: str) -> bool:
    """True for what stands after the 4 of "4 million"."""
    return bool(_FACTOR.match(rest))


def changes_number(statement: str) -> bool:
    """True for a number with words behind it that say another value: "42 million", "5 plus one"."""
    match = _WORDS_AFTER_NUMBER.match(statement)
    if match is None:
        return False
    words = {word.lower() for word in _WORD.findall(match[1])}
    return not words.isdisjoint(_NO_UNITS | FACTORS.keys())
