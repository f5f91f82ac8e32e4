"""Text from files, models and verifiers, made safe to print: a terminal obeys control characters, wherever they come from.

Whatever prints to a terminal or a log uses these functions: errors.py, observe/console.py, `__main__`, launch.py, dist/leaving.py,
doctor.py, `rpp score`, reward/output.py.
"""

from __future__ import annotations

import re

# C0 and C1 control characters and DEL; marks and overrides of the writing direction; the two Unicode line separators; halves of
# surrogate pairs, which no encoding can write.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    r"""`text` on one line. Each unsafe character becomes an escape that JSON understands too: \n, \u001b, \u202e."""
    return _UNSAFE.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", text)


def printable_lines(text: str, *, indent: int) -> str:
    """As `printable`, but newlines stay.

    indent: spaces that every line after the first begins with at least. Text from outside cannot forge a line further to the left.
    """
    first, *others = text.split("\n")
    lines = [printable(first)]
    for line in others:
        missing = indent - (len(line) - len(line.lstrip(" ")))
        lines.append(" " * missing + printable(line))
    return "\n".join(lines)
