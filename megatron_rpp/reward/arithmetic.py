"""Reward 1 when the last number of the response is the answer. The quickstart's verifier: strict and fast."""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import RewardInput

# A word with a digit in it, and what it is glued to. Only a word that is a number in full counts: "12a", "1.2.3", "x2" do not.
_WORD = re.compile(r"[\w.,]*\d[\w.,]*")
_NUMBER = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+", re.ASCII)
_OPERATORS = frozenset("+-*/^=%<>")


def last_number(text: str) -> Decimal | None:
    """The value of the last number in the text, or None if the last thing with a digit is not a plain number.

    "-3" is a number; the 3 in "5-3" and in "3 + " is an operand and not an answer. "=-3", "= 3", "1,234", "18.0" are read;
    "1e5", "3/4", "12a" and "18%" are not.
    """
    words = list(_WORD.finditer(text))
    if not words:
        return None
    match = words[-1]
    word = match.group().rstrip(".,")  # the full stop after the answer
    if not _NUMBER.fullmatch(word):
        return None
    before, after = text[: match.start()].rstrip(), text[match.end() :].lstrip()
    if after[:1] in _OPERATORS:
        return None
    sign = ""
    if before.endswith("-"):
        sign, left = "-", before[:-1]
        before = left.rstrip()
        if left[-1:].isalpha() or before[-1:].isdigit() or (before and before[-1] in ").-+*/^"):
            return None  # the minus of a subtraction
    if before and before[-1] in "+*/^<>%":
        return None
    return Decimal(sign + word.replace(",", ""))  # not sign * Decimal: that rounds to 28 digits


def score(item: RewardInput) -> float:
    """1.0 if the last number of the response equals the answer, exactly, as decimals.

    Raises: RewardError when the answer itself is not a number: the data does not fit this reward.
    """
    expected = last_number(item.answer)
    if expected is None:
        raise RewardError(f"the answer {item.answer!r} is not a number", where="reward arithmetic", fix="use reward.name=exact or math")
    return float(last_number(item.response) == expected)
