"""Reads a canonical answer: a word, number, formula, list, pair, set, equation, inequality, ratio or time."""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import cache

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig
from sympy import Basic

from megatron_rpp.reward.brackets import is_readable, split, split_inside, split_list
from megatron_rpp.reward.kinds import (
    EMPTY_SET,
    Choice,
    Clock,
    Formula,
    Group,
    Named,
    Numeral,
    Percent,
    Ratio,
    Reading,
    Relation,
    Residue,
    Scaled,
    Word,
)
from megatron_rpp.reward.notation import joined
from megatron_rpp.reward.units import factor_of

MAX_CHARS = 1_000  # longer answers are compared as text only
_MAX_DIGITS = 1_000


_EMPTY_SET = re.compile(r"\\emptyset|\\\{ ?\\\}|no (?:real )?solutions?|(?:the )?empty set", re.IGNORECASE)
_REALS = re.compile(r"all reals?(?: numbers)?", re.IGNORECASE)
_PHRASES = {"dne": "does not exist", "d.n.e": "does not exist"}
_NUMBER = re.compile(r"([-+]?) ?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_FRACTION = re.compile(r"([-+]?) ?(?:([0-9]+) ?/ ?([0-9]+)|\\frac\{ ?(-? ?[0-9]+) ?\}\{ ?([0-9]+) ?\})")
_COMMAS = re.compile(r"([-+]?)([1-9][0-9]{0,2}(?:,[0-9]{3})+)(\.[0-9]+)?")
_REPEATING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{? ?([0-9]+) ?\}?")
_ELLIPSIS = r"\ldots"
_DOTS = re.compile(r"(-?[0-9]*\.[0-9]*?)([0-9]+?)\2{2,} ?\\ldots")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_BASES |= {"ten": "10", "twelve": "12", "sixteen": "16"}
_NUMERAL = re.compile(
    rf"""\(?(-?[0-9][0-9A-Za-z.]*)\)? (?: \ ?_ | (?:\ |\ ?\\text\{{\ ?)(?:in\ )?base )
        [\ {{}}]* (?:\\text\{{\ ?)? ([0-9]+|{"|".join(_BASES)}) [\ }}]*""",
    re.VERBOSE,
)
_CLOCK = re.compile(
    r"([0-9]{1,2})((?::[0-9]{2}){0,2}) ?(?:\\text\{)? ?([ap])?\.? ?(?(3)m\.?) ?\}?",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'. -]*[A-Za-z.]")
_SHORT_PARTS = re.compile(r"(?![A-Z ]+$)[A-Za-z]{1,2}(?:[- ]+[A-Za-z]{1,2})+")  # "a - b", "x y"; not "A B"
_LETTER = re.compile(r"[A-Za-z]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CHOICE = re.compile(r"(?:\\text\{ ?\(([A-Z])\) ?\}|\(([A-Z])\)|([A-Z])[).:](?= )) ?(.*)", re.DOTALL)
_ORDINAL = re.compile(r"(?<=[0-9])(?:(?:\^ ?\{? ?)?\\text\{ ?(?:st|nd|rd|th) ?\} ?\}?|(?:st|nd|rd|th))$")
_UNITS = re.compile(r"(?:(?:[ /\\]|\\cdot)*\\text\{[^{}]*\}(?: ?\^ ?\{?-?[0-9]\}?)?)+\.?$")
# Words of four letters or more after a space, or a common abbreviation: "12 boxes", "12cm", and not "2xy".
_PLAIN_UNITS = re.compile(
    r"""(?:(?<=[0-9})])|(?<=\\pi))
        (?: \ +[A-Za-z]{4,} | \ +[A-Za-z]{2,}\ [A-Za-z\ ]{3,}
          | \ ?(?:[cmk]m|in|ft|mi|kg|mg|ml|lbs?|oz|min|sec|hrs?|USD|mph|km/h|m/s|rad)(?:\^\ ?\{?[23]\}?)? )\.?$""",
    re.VERBOSE,
)
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_RESIDUE = re.compile(r"(?:[A-Za-z] ?\\equiv ?)?(.*?) ?\\pmod ?\{? ?([0-9A-Za-z]+) ?\}?")
_SET_BUILDER = re.compile(r"[A-Za-z] ?(?:\\mid|\\vert|\||:) ?(.*)", re.DOTALL)
_SIGN_FIRST = re.compile(r"[<>]|\\(?:ne|le|ge|in)(?![A-Za-z])")
_PERCENT = re.compile(r"(.*[0-9})]) ?\\%", re.DOTALL)
_DEGREES = re.compile(r"\^ ?\\circ ?(?:[CF]|\\text\{ ?[CF] ?\})?(?![A-Za-z])")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])")
_ANGLE = re.compile(r"([0-9.]+) ?\^ ?\\circ")
_LEAD = re.compile(r"^(?:=|\\(?:approx|sim|therefore|implies|(?:Long)?[Rr]ightarrow)(?![A-Za-z])) ?")
_SIGNS = frozenset(("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in"))
# x, f(x), a_1, f^{-1}(x), (x, y), \text{Area}, \angle ABC, \overline{AB}, |AB|
_NAME = re.compile(
    r"""\\?[A-Za-z]+ (?: ' | _\{?[A-Za-z0-9]+\}? | _\\text\{[^{}]*\} | \^\{-1\} )* (?:\ ?\(\ ?[A-Za-z0-9,\ ]+\ ?\))?
      | \( [A-Za-z_0-9]+ (?:\ ?,\ ?[A-Za-z_0-9]+)+ \)
      | \\text\{[^{}]*\}
      | (?:m\ ?)?\\(?:angle|triangle)\ ?[A-Za-z]{1,3}
      | \\(?:overline|bar|vec|hat|widehat)\{?\ ?[A-Za-z]+\ ?\}?
      | \|[A-Z]{1,2}\|""",
    re.VERBOSE,
)
_NAME_OF_VALUE = re.compile(r"\\?[A-Za-z]+(?:\^\{-1\})?\ ?\(\ ?[A-Za-z0-9,\ ]+\ ?\)")  # f(3)
_NAME_BEGIN = re.compile(r"\\?[A-Za-z(|]|\[[A-Z]{3}")
_NO_NAME = re.compile(r"(?<![_0-9^{])[0-9]|[?!]|\b(?:or|not|but|except|never|wrong|anything)\b", re.IGNORECASE)
_GAP = re.compile(r"(?<![_^])[0-9] [0-9.]")
_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    try_extract_without_anchor=False,
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last"),
)


def read(text: str) -> Reading | None:
    """What a canonical text says, or None for what nothing reads."""
    text = _LEAD.sub("", text)
    if not text or len(text) > MAX_CHARS:
        return None
    if (number := read_number(text)) is not None:
        return number
    if _ELLIPSIS in text:
        return _read_ellipsis(text)
    if _EMPTY_SET.fullmatch(_unwrapped(text).rstrip(". ")):
        return EMPTY_SET
    if _REALS.fullmatch(_unwrapped(text)):
        return Formula(sympy.S.Reals)
    if (match := _CHOICE.fullmatch(text)) and match[4]:
        value = read(match[4])
        return Choice((match[1] or match[2] or match[3]).lower(), value) if value is not None else None
    if not is_readable(text):
        return None
    if match := _RESIDUE.fullmatch(text):
        number, modulus = read(match[1]), read(match[2])
        return Residue(number, modulus) if number is not None and modulus is not None else None
    for form in (_read_text, _read_list, _read_sides, _read_group, _read_quantity):
        if (reading := form(text)) is not None:
            return reading
    return None


def read_number(text: str) -> Fraction | None:
    """A decimal or a fraction of two integers."""
    if len(text) > _MAX_DIGITS:
        return None
    if match := _COMMAS.fullmatch(text):
        return Fraction("".join((match[1], match[2].replace(",", ""), match[3] or "")))
    if match := _NUMBER.fullmatch(text):
        return Fraction(match[1] + match[2])
    if match := _FRACTION.fullmatch(text):
        top, bottom = int((match[2] or match[4]).replace(" ", "")), int(match[3] or match[5])
        return Fraction(-top if match[1] == "-" else top, bottom) if bottom else None
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, repeated = match.groups()
        nines = 10 ** len(fixed) * (10 ** len(repeated) - 1)
        value = Fraction(int(f"0{whole}{fixed}{repeated}") - int(f"0{whole}{fixed}"), nines)
        return -value if sign else value
    return None


def read_formula(text: str) -> Basic | None:
    """The expression that math-verify's parser makes of LaTeX. Digits with white space between them are not read."""
    if _GAP.search(text) or _SIGN_FIRST.match(text) or re.search("[0-9] ?'", text):
        return None
    if not text.isascii() or "answer" in text.lower():
        return None  # math-verify looks for numbers after the word "answer"
    if any(factor_of(inside) is None for inside in _TEXT.findall(text)):
        return None
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(r"{\\frac{\1 \\pi}{180}}", text)
    text = _DEGREES.sub("", text)
    parsed = math_verify.parse(f"\\boxed{{{text}}}", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], Basic | sympy.MatrixBase):
        return None
    symbols = parsed[0].free_symbols
    is_complex = {symbol.name for symbol in symbols} == {"i"}
    return parsed[0].xreplace(dict.fromkeys(symbols, sympy.I)) if is_complex else parsed[0]


def _read_ellipsis(text: str) -> Fraction | None:
    """0.333... is 1/3. What other dots leave out is not read."""
    match = _DOTS.fullmatch(text)
    return read_number(rf"{match[1]}\overline{{{match[2]}}}") if match else None


def _unwrapped(text: str) -> str:
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def _read_text(text: str) -> Reading | None:
    """Words: \\text{east}, Evelyn, does not exist, (C), 9 a.m."""
    if (match := _CLOCK.fullmatch(text)) and (match[2] or match[3]):
        digits = (int(match[1]), *(int(part) for part in match[2].split(":")[1:]))
        return Clock(digits if len(digits) > 1 else (*digits, 0), (match[3] or "").lower() + "m" * bool(match[3]))
    if match := _NUMERAL.fullmatch(text):
        return Numeral(match[1].lower(), _BASES.get(match[2], match[2]))
    plain = _unwrapped(text)
    if match := re.fullmatch(r"\(?([A-Za-z])\)?\.?", plain):
        return _as_formula(match[1])
    is_words = _WORD.fullmatch(plain) and not {"and", "or"} & set(plain.split())
    if plain != text and _TEXT.fullmatch(text):
        inner = None if is_words else read(plain)
        return inner if inner is not None else Word(_word(plain), True)
    if is_words and plain == text and _SHORT_PARTS.fullmatch(text):
        return _as_formula(text)
    if is_words:
        return Word(_word(plain), plain != text or " " in plain, plain)
    return None


def _as_formula(text: str) -> Formula | None:
    expression = read_formula(text)
    letters = frozenset(_LETTER.findall(_COMMAND.sub(" ", _TEXT.sub(" ", text))))
    return Formula(expression, letters) if expression is not None else None


def _word(text: str) -> str:
    text = text.lower().strip(" .")
    return _PHRASES.get(text, text)


def _read_list(text: str) -> Reading | None:
    """a, b and c. The first item may name the whole: k = 1, 2, 3."""
    items, separators = split_list(text)
    if len(items) < 2:
        return _read_plus_minus(text)
    first, signs = split(items[0], _SIGNS)
    names_all = signs == ["="] and _NAME.fullmatch(first[0]) and not any(split(item, _SIGNS)[1] for item in items[1:])
    if names_all:
        listing = _group("", [first[1], *items[1:]], "", tuple(separators))
        return Named(joined(first[0]).lower(), (listing,)) if listing else None
    return _group("", items, "", tuple(separators))


def _read_plus_minus(text: str) -> Reading | None:
    """\\pm 5 is the list 5, -5."""
    if len(_PLUS_MINUS.findall(text)) != 1 or r"\mp" in text or r"\{" in text:
        return None
    plus = re.sub(r"(^|[=({]) ?\+ ?", r"\1", _PLUS_MINUS.sub("+", text))
    return _group("", [plus, _PLUS_MINUS.sub("-", text)], "", ("or",))


def _group(opening: str, items: list[str], closing: str, separators: tuple[str, ...] = ()) -> Group | None:
    readings: list[Reading] = []
    for item in items:
        reading = read(item)
        if reading is None:
            return None
        # The two values of "\pm 5" are two items of the list or set that it stands in.
        is_pair = opening in ("", r"\{") and isinstance(reading, Group) and not reading.opening
        readings += reading.items if is_pair else [reading]
    return Group(opening, tuple(readings), closing, separators)


def _read_group(text: str) -> Reading | None:
    inside = split_inside(text)
    if inside is None:
        return None
    opening, items, closing = inside
    if len(items) == 1 and opening != r"\{":
        return read(items[0]) if (opening, closing) in (("(", ")"), ("{", "}")) else None
    if opening == "{":
        return None
    if len(items) == 1 and (match := _SET_BUILDER.fullmatch(items[0])):
        return read(match[1])
    return _group(opening, items, closing)


def _read_sides(text: str) -> Reading | None:
    """Equations, inequalities, membership and ratios."""
    parts, colons = split(text, frozenset((":",)))
    if colons and all(parts):
        readings = tuple(read(part) for part in parts)
        return None if None in readings else Ratio(readings)
    sides, signs = split(text.replace("<=", r"\le ").replace(">=", r"\ge "), _SIGNS)
    if not signs or not all(sides):
        return None
    if set(signs) <= {"=", r"\in"}:
        return _equation(sides)
    formulas = tuple(read_formula(side) for side in sides)
    return None if None in formulas or r"\in" in signs else Relation(formulas, tuple(signs))


def _equation(sides: list[str]) -> Reading | None:
    """A name and its value, in either order; without a name, a chain of values or an equation in unknowns."""
    if len(sides) == 2 and all(map(_LETTER.fullmatch, sides)):
        return Relation(tuple(map(read_formula, sides)), ("=",))
    if len(sides) == 2 and not _NAME.fullmatch(sides[0]):
        left, right = (read_formula(side) for side in sides)
        if _NAME.fullmatch(sides[1]):
            sides = sides[::-1]
        elif None not in (left, right) and None in map(read_number, sides) and left.free_symbols | right.free_symbols:
            return Relation((left, right), ("=",))
    has_name = _is_name(sides[0], len(sides) == 2)
    values = tuple(read(side) for side in (sides[1:] if has_name else sides))
    return None if None in values else Named(joined(sides[0]).lower() if has_name else "", values)


def _is_name(side: str, is_only: bool) -> bool:
    """True for what may be named. Of the left sides that nothing reads, those without a number, a doubt or a choice."""
    if _NO_NAME.search(side) and not _NAME_OF_VALUE.fullmatch(side):
        return False
    return bool(_NAME.fullmatch(side)) or (is_only and bool(_NAME_BEGIN.match(side)) and read(side) is None)


def _read_quantity(text: str) -> Reading | None:
    """A formula with a unit, a percent sign or neither."""
    if match := _PERCENT.fullmatch(text):
        number = read(match[1])
        return Percent(number) if number is not None else None
    bare = _ORDINAL.sub("", text).rstrip(" \\")
    factor = 1
    for units in (_UNITS, _PLAIN_UNITS):
        if match := units.search(bare):
            times = factor_of(match.group())
            if times is None:
                return None
            bare, factor = bare[: match.start()].rstrip(" \\"), factor * times
    if not _TRIGONOMETRIC.search(bare):
        bare = _DEGREES.sub("", bare).strip()
    if bare and bare != text and re.search(r"[0-9A-Za-z]", bare):
        number = read(bare)
        return Scaled(number, factor) if number is not None and factor > 1 else number
    return _as_formula(text)


@cache
def silence_libraries() -> None:
    """They warn, once per process, that their own time limits are off."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.ERROR)
