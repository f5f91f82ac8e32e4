"""Splits LaTeX where no bracket is open."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = frozenset(("(", "[", "{", r"\{", r"\lbrace", r"\langle", r"\lfloor", r"\lceil", r"\begin"))
_CLOSE = frozenset((")", "]", "}", r"\}", r"\rbrace", r"\rangle", r"\rfloor", r"\rceil", r"\end"))
_MAX_DEPTH = 20
_THOUSANDS_BEFORE = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})*$")
_THOUSANDS_AFTER = re.compile(r",[0-9]{3}(?![0-9])")
_AND_OR = re.compile(
    r""",?\s* (?: \\text\{\s*,?\s*(and|or)\s*\} | (?<![A-Za-z\\])(and|or)(?![A-Za-z])
        | \\(lor|vee|land|wedge)(?![A-Za-z]) )""",
    re.VERBOSE,
)
_AND, _OR = "\x00", "\x01"  # the words, as one character each
_PAIRS = {
    "{": ("}",),
    "(": (")", "]"),
    "[": (")", "]"),
    r"\{": (r"\}",),
    r"\lbrace": (r"\rbrace",),
    r"\langle": (r"\rangle",),
}
_SAME = {r"\lbrace": r"\{", r"\rbrace": r"\}", r"\langle": "(", r"\rangle": ")"}
_NAMES = {",": ",", ";": ";", _AND: "and", _OR: "or"}


def tokens(text: str) -> Iterator[tuple[int, str, int]]:
    """Each token with its position and the number of brackets open around it; a bracket stands outside of itself."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSE:
            depth -= 1
        yield match.start(), token, depth
        if token in _OPEN:
            depth += 1


def is_readable(text: str) -> bool:
    """True if the brackets close in order, at most 20 deep. "(" and "[" may close each other: (1,2]."""
    waiting: list[bool] = []  # of each open bracket, whether it is a brace or a command
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _OPEN:
            waiting.append(token not in "([")
            if len(waiting) > _MAX_DEPTH:
                return False
        elif token in _CLOSE and (not waiting or waiting.pop() == (token in ")]")):
            return False
    return not waiting


def is_deep(prose: str) -> bool:
    """True if more than 20 brackets are open at once. In prose they need not close."""
    return any(depth > _MAX_DEPTH for _, _, depth in tokens(prose))


def split(text: str, separators: frozenset[str]) -> tuple[list[str], list[str]]:
    """The parts between separators outside of all brackets, and the separators."""
    parts, found, begin = [], [], 0
    for position, token, depth in tokens(text):
        if depth == 0 and token in separators and not (token == "," and _is_in_number(text, position)):
            parts.append(text[begin:position].strip())
            found.append(token)
            begin = position + len(token)
    return [*parts, text[begin:].strip()], found


def split_list(text: str) -> tuple[list[str], list[str]]:
    """The items of "a, b and c" and what separates them: ",", ";", "and", "or".

    The comma of "1,234" is no separator.
    """
    parts, found = split(_AND_OR.sub(_and_or, text), frozenset(_NAMES))
    return parts, [_NAMES[token] for token in found]


def _and_or(match: re.Match[str]) -> str:
    word = match[1] or match[2] or match[3]
    return _OR if word in ("or", "lor", "vee") else _AND


def split_inside(text: str) -> tuple[str, list[str], str] | None:
    """Opening bracket, items and closing bracket, when one pair encloses the whole text."""
    steps = list(tokens(text))
    (_, opening, _), (_, closing, _) = steps[0], steps[-1]
    if len(steps) < 2 or closing not in _PAIRS.get(opening, ()) or any(depth <= 0 for _, _, depth in steps[1:-1]):
        return None
    opening, closing = (_SAME.get(bracket, bracket) for bracket in (opening, closing))
    inside = text[len(steps[0][1]) : steps[-1][0]].strip()
    if not inside:
        return opening, [], closing
    # Inside brackets every comma separates: (3,100) is a point.
    return opening, split(inside.replace(",", " , "), frozenset((",", ";")))[0], closing


def _is_in_number(text: str, comma: int) -> bool:
    begin = max(0, comma - 40)
    return bool(_THOUSANDS_AFTER.match(text, comma) and _THOUSANDS_BEFORE.search(text[begin:comma]))
