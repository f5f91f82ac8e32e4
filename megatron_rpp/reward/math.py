"""Reward 1 when the response's final answer is mathematically equal to the reference, by the library math-verify.

What counts as the final answer, first that applies:
1. what stands in the last complete \\boxed{...},
2. what follows the last "####" on its line,
3. what math-verify finds: "the answer is ...", else the last LaTeX expression or number.
Text before "</think>" is never looked at, and a thought that was not closed has no answer.

Call it in a RewardPool only: symbolic comparison can run for ever or eat all memory (9^{9^{9^9}}), and math-verify's own
limits use SIGALRM, which fails outside a main thread; they are switched off here.
"""

from __future__ import annotations

import logging
import re
from functools import cache

import math_verify

from megatron_rpp.reward.base import RewardInput

# A box that opens, a box around one character ("\\boxed 2"), an escaped character, a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<open>\{)|(?P<single>[^\s{}\\]))|\\.|[{}]", re.DOTALL)
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_\{?([0-9]+)\}?")


def score(item: RewardInput) -> float:
    """1.0 if the final answer of the response equals the reference answer, else 0.0. A response without one scores 0."""
    _silence_libraries()
    gold = explicit_answer(item.answer) or item.answer.strip()
    response = _after_thinking(item.response)
    given = explicit_answer(response)
    if given is None:
        if _same_text(response, gold):
            return 1.0
        return float(math_verify.verify(_parse(_boxed(gold)), _parse(response), timeout_seconds=None))
    if _same_text(given, gold):
        return 1.0
    if _are_in_different_bases(given, gold):
        return 0.0
    return float(math_verify.verify(_parse(_boxed(gold)), _parse(_boxed(given)), timeout_seconds=None))


def _after_thinking(text: str) -> str:
    _, closed, answer = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return ""
    return answer


def explicit_answer(text: str) -> str | None:
    """The content of the last complete box, else of the last "####" line, else None."""
    if (content := _last_box(text)) is not None:
        return content.strip()
    _, marker, rest = text.rpartition("####")
    return (rest.strip().splitlines() or [""])[0].strip() if marker else None


def _last_box(text: str) -> str | None:
    """What the complete box that begins last holds. One pass: a model that repeats "\\boxed{" for ever costs no more than others."""
    last_start, content = -1, None
    open_braces: list[int] = []  # where the content of each begins; -1 for a brace that is no box
    for token in _BRACES.finditer(text):
        if token["single"]:
            last_start, content = token.start("single"), token["single"]
        elif token["open"]:
            open_braces.append(token.end())
        elif token.group() == "{":
            open_braces.append(-1)
        elif token.group() == "}" and open_braces and (start := open_braces.pop()) > last_start:
            last_start, content = start, text[start : token.start()]
    return content


def _boxed(expression: str) -> str:
    return rf"\boxed{{{expression}}}"


def _parse(text: str) -> list[object]:
    return math_verify.parse(text, parsing_timeout=None)


def _same_text(left: str, right: str) -> bool:
    """Equal but for white space and dollar signs: true answers that no parser reads still count, and most cost nothing."""
    left, right = (re.sub(r"[\s$]", "", text) for text in (left, right))
    return bool(left) and left == right


def _are_in_different_bases(given: str, gold: str) -> bool:
    """1011_2 against 1011_3: math-verify drops the subscript."""
    given_match, gold_match = _IN_BASE.fullmatch(given), _IN_BASE.fullmatch(gold)
    return bool(given_match and gold_match and given_match.group(2) != gold_match.group(2))


@cache
def _silence_libraries() -> None:
    """They warn, once a process, that the limits are off."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.ERROR)
