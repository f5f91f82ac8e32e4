"""Typographic characters that stand for ASCII ones. Standard library only: every built-in reward uses it."""

from __future__ import annotations

import re

# Hyphens, the figure dash, the en dash, the minus sign and its small and wide forms. An em dash is punctuation.
_MINUS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
_TIMES = "\u00d7\u00b7\u2217\u2219\u22c5\u2715\u2716\uff0a"
_DIVIDE = "\u00f7\u2044\u2215\uff0f"
_SPACES = "\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_NOT_SHOWN = "\u200b\u200c\u200d\u2060\ufeff"
EM_DASH = "\u2014"

WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of the printable ASCII characters
ASCII = {
    **WIDE,
    **dict.fromkeys(map(ord, _MINUS), "-"),
    **dict.fromkeys(map(ord, _SPACES), " "),
    **dict.fromkeys(map(ord, _NOT_SHOWN), ""),
}
OPERATORS = {**ASCII, **dict.fromkeys(map(ord, _TIMES), "*"), **dict.fromkeys(map(ord, _DIVIDE), "/")}

# An opening mark follows the start of a word, a closing mark its end, so that "2 ** 9" and "2*3*4" are no emphasis.
_EMPHASIS = re.compile(
    r"""(?<![^\s(\[{"':*_`]) (?P<mark>\*{1,3}|_{1,3}|`{1,3}) (?=[^\s*_`])
        (?P<inside>[^*_`\n]*[^\s*_`]) (?P=mark) (?![0-9A-Za-z])""",
    re.VERBOSE,
)
_NESTING = 3  # **Answer: `9`** is two deep


# The end of a turn, and the answer tag of some templates.
_TAG = re.compile(r"</?answer>|</s>|<\|[\w ]{1,40}\|>")


def without_tags(text: str) -> str:
    """The text with a line break for each tag of a chat template or an answer."""
    return _TAG.sub("\n", text)


def without_emphasis(text: str) -> str:
    """The text without the Markdown marks of bold, italic and code."""
    for _ in range(_NESTING):
        text, count = _EMPHASIS.subn(r"\g<inside>", text)
        if not count:
            break
    return text
