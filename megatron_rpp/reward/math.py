"""Reward 1 when the response's final answer is mathematically equal to the reference.

What counts as the final answer, first that applies (docs/rewards.md has the details):
1. what stands in the last complete \\boxed{...}, together with boxes that form a list with it,
2. what stands on the last line that begins with GSM8K's marker "####" and holds an answer,
3. what follows the last "the answer is" or "Answer:",
4. what the library math-verify finds: the last LaTeX expression or number.
Text before "</think>" is never looked at, and a thought that was not closed has no answer.

Call it in a RewardPool only: an integral or a binomial coefficient can take for ever or eat all memory, and
math-verify's own limits use SIGALRM, which fails outside a main thread; they are switched off here.
"""

from __future__ import annotations

from functools import lru_cache

import math_verify

from megatron_rpp.reward.base import RewardInput
from megatron_rpp.reward.brackets import is_deep, split_list
from megatron_rpp.reward.characters import without_tags
from megatron_rpp.reward.equality import equal
from megatron_rpp.reward.final_answer import explicit_answer, has_open_box, is_mathematics, stated_answer
from megatron_rpp.reward.formulas import SYMPY_ERRORS
from megatron_rpp.reward.kinds import Reading
from megatron_rpp.reward.notation import canonical, joined, plain, with_marked_mixed
from megatron_rpp.reward.readings import MAX_CHARS, read, silence_libraries
from megatron_rpp.reward.thought import after_thought
from megatron_rpp.reward.units import begins_with_factor, changes_number

_LONGEST = 2 * MAX_CHARS
_TAIL = 4_000  # characters from the end in which an answer without a box is looked for


def score(item: RewardInput) -> float:
    """1.0 if the final answer of the response equals the reference, else 0.0. A response without one scores 0."""
    silence_libraries()
    gold = explicit_answer(item.answer) or item.answer.strip()
    response = without_tags(after_thought(item))
    given = explicit_answer(response)
    if given is not None:
        return float(are_equal(given, gold) or _are_all_of(response, gold))
    if has_open_box(response):
        return 0.0
    if _same_text(response, gold):
        return 1.0
    prose = plain(response[-_TAIL:])
    stated = stated_answer(prose)
    if stated == "":
        return 0.0
    if stated and are_equal(stated, gold):
        return 1.0
    if stated and (is_mathematics(stated) or changes_number(stated)):
        return 0.0
    return float(_is_last_expression(prose, gold))


def are_equal(given: str, gold: str) -> bool:
    """True if the two answers are the same text or have the same value.

    An answer that cannot be read or evaluated equals only the same text.
    """
    if _same_text(given, gold):
        return True
    if max(len(given), len(gold)) > _LONGEST:
        return False
    try:
        left, right = _read(canonical(given)), _read(canonical(gold))
        return left is not None and right is not None and equal(left, right)
    except SYMPY_ERRORS:
        return False


def _are_all_of(response: str, gold: str) -> bool:
    """True for boxes joined by "or" that are the items of a reference with several: the roots of an equation."""
    boxes = explicit_answer(response, with_or=True)
    return boxes != explicit_answer(response) and len(split_list(gold)[0]) > 1 and are_equal(boxes or "", gold)


def _is_last_expression(prose: str, gold: str) -> bool:
    """True if the last expression that math-verify finds in the prose equals the reference."""
    if len(gold) > _LONGEST or is_deep(prose):
        return False
    try:
        parsed = math_verify.parse(with_marked_mixed(prose.replace(r"\$", "")), parsing_timeout=None)
        if not parsed or begins_with_factor(prose.rpartition(str(parsed[-1]))[2]):
            return False
        # Its source text, not its value: this module's own reader knows f(3) = 42, |S| = 42 and 12 + 30 = 42.
        left, right = read(canonical(parsed[-1])), _read(canonical(gold))
        return left is not None and right is not None and equal(left, right)
    except SYMPY_ERRORS:
        return False


@lru_cache(maxsize=512)
def _read(text: str) -> Reading | None:
    """As `read`. The reference is read once for all responses to its prompt."""
    return read(text)


def _same_text(left: str, right: str) -> bool:
    """Equal in one spelling: true answers that nothing reads still count, and most cost nothing."""
    if max(len(left), len(right)) > _LONGEST:
        return left.strip() == right.strip()
    left, right = (joined(canonical(text)) for text in (left, right))
    return bool(left) and left == right
