"""Reward 1 when the last number of the response is the answer. The quickstart's verifier: strict and fast."""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import RewardInput
from megatron_rpp.reward.characters import EM_DASH, OPERATORS, without_emphasis, without_tags
from megatron_rpp.reward.thought import after_thought
from megatron_rpp.reward.units import FACTORS

# A word with a digit in it, and what it is glued to. Only a word that is a number in full counts: "12a", "1.2.3", "x2"
# do not.
_WORD = re.compile(r"[\w.,]+")
_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+", re.ASCII)
_BEFORE = frozenset("+*/^<>%\u00b1\u2213\u221a\u221b\u221c\u2260")  # plus-minus, root and unequal signs too
_AFTER = _BEFORE | frozenset("-=!\u00b0\u2030\u207a\u207b\u207c\u207d")  # and superscript signs
# What may stand between an operator and its number: brackets, dollars, spaces, LaTeX commands that change no value.
_OPENING = re.compile(
    r"""(?: [\s({\[$\u20ac\u00a3\u00a5"'] | \\[(\[$] | \\(?:boxed|fbox|text|textbf|mathbf|mathrm)(?=\{) )+$""",
    re.VERBOSE,
)
_CLOSING = re.compile(r"^(?:[\s)}\]$\"']|\\[)\]$])+")
_FUNCTION = re.compile(r"(?:\\[A-Za-z]+|\b(?:sqrt|cbrt|root|log|ln|exp|abs|sin|cos|tan))$")
# Words and LaTeX commands that make another number of it. Other commands lay the text out.
_LAYOUT = r"""(?:text\w*|math[a-z]{2}|boxed|fbox|q?quad|end|left|right|displaystyle|[lL]arge|huge|therefore|implies
    |(?:Long|long)?[rR]ightarrow|checkmark|blacksquare|square|hfill|newline|par)(?![A-Za-z])"""
_MORE = re.compile(rf"\s*(?:\\(?:%|(?!{_LAYOUT})[A-Za-z])|(?:{'|'.join(FACTORS)}|percent)\b)", re.VERBOSE)
_LESS = re.compile(rf"(?:\\(?!{_LAYOUT})[A-Za-z]+|\b(?:minus|negative|plus|times)|!=)\s*$", re.VERBOSE)
_GROUP = re.compile(r"[0-9]{3}(?:[.,].*)?")
_DASH_OF_PROSE = re.compile(r"\s*\u2013\s+[^\W\d_]{2}")  # "9 - done", with an en dash
_MAX_WRAPPER = 200  # characters looked at on either side of the number


def last_number(text: str) -> Decimal | None:
    """The value of the last number in the text, or None if the last thing with a digit is not a plain number.

    "-3" is a number with any minus sign. The 3 in "5-3", "5*3" with any times sign, and "3 + " is an operand, not an
    answer. "=-3", "= 3", "1,234", "18.0", "**9**" are read; "1e5", "3/4", "12a", "18%", "9!", "9:30" are not.
    """
    text = without_emphasis(without_tags(text))
    words = reversed(list(_WORD.finditer(text)))
    match = next((word for word in words if _DIGIT.search(word.group())), None)
    if match is None:
        return None
    word = match.group().translate(OPERATORS).rstrip(".,")  # the full stop after the answer
    if not _NUMBER.fullmatch(word) or _goes_on(text[match.end() : match.end() + _MAX_WRAPPER]):
        return None
    before = text[max(0, match.start() - _MAX_WRAPPER) : match.start()]
    negative = _is_negative(before.translate(OPERATORS), word)
    if negative is None:
        return None
    return Decimal("-" * negative + word.replace(",", ""))  # not sign * Decimal: that rounds to 28 digits


def _goes_on(after: str) -> bool:
    """True if an operator follows the number. A dash before a word is punctuation."""
    if _DASH_OF_PROSE.match(after):
        return False
    if _MORE.match(_CLOSING.sub("", after)):
        return True
    following = _CLOSING.sub("", after.translate(OPERATORS))[:1]
    return following in _AFTER or following.isnumeric()


def _is_negative(before: str, word: str) -> bool | None:
    """True after a minus sign, False for a number without one, None for an operand or a part of something longer."""
    if _GROUP.fullmatch(word) and re.search(r"(?<![\w.,])[0-9]{1,3} $", before):
        return None  # "9 000": digits in groups are not read
    before, wrapped = _strip_opening(before)
    if _LESS.search(before):
        return None  # \sqrt 9, minus 9
    if wrapped and (before.endswith("}") or _FUNCTION.search(before)):
        return None  # \frac{1}{9}, \sqrt{9}
    if re.search(rf"[0-9][:{EM_DASH}]$", before):
        return None  # a time, a ratio, a range
    negative = before.endswith("-")
    if negative:
        left = before[:-1]
        before, _ = _strip_opening(left)
        if left[-1:].isalpha() or before[-1:].isdigit() or before[-1:] in (")", ".", "-"):
            return None  # the minus of a subtraction
    return None if before[-1:] in _BEFORE else negative


def _strip_opening(before: str) -> tuple[str, bool]:
    """The text without the brackets and spaces at its end, and whether a brace or a parenthesis touched the number."""
    stripped = _OPENING.sub("", before)
    return stripped, before[-1:] in ("(", "{")


def score(item: RewardInput) -> float:
    """1.0 if the last number after the thought equals the answer, exactly, as decimals.

    Raises: RewardError when the answer itself is not a number: the data does not fit this reward.
    """
    expected = last_number(item.answer)
    if expected is None:
        raise RewardError(f"the answer {item.answer!r} is not a number", where="reward arithmetic", fix="use reward.name=exact or math")
    return float(last_number(after_thought(item)) == expected)
