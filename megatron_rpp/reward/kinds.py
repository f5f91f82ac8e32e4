"""The kinds of answer that are told apart."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from sympy import Basic


@dataclass(frozen=True, slots=True)
class Word:
    """A word.

    text: in lower case.
    marked: written as \\text, so it is not a product of its letters.
    letters: as written.
    """

    text: str
    marked: bool
    letters: str = ""


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a base, as written: 1011_2."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day. half: "am", "pm", or "" when it is not said."""

    digits: tuple[int, ...]
    half: str


@dataclass(frozen=True, slots=True)
class Percent:
    number: Reading


@dataclass(frozen=True, slots=True)
class Residue:
    """7 (mod 12)."""

    number: Reading
    modulus: Reading


@dataclass(frozen=True, slots=True)
class Scaled:
    """A number with a word for a power of ten, or "dozen": 5 million."""

    number: Reading
    factor: int


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple-choice answer and its value."""

    letter: str
    value: Reading


@dataclass(frozen=True, slots=True)
class Group:
    """Items in brackets: a pair, an interval, a set. A bare list has empty brackets and the separators of its items."""

    opening: str
    items: tuple[Reading, ...]
    closing: str
    separators: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Named:
    """name = value, or name in value; of a chain "x = a = b" all values. The name is empty in "2^{10} = 1024"."""

    name: str
    values: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of two or more formulas with =, <, >, <=, >=, != between them."""

    sides: tuple[Basic, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Formula:
    """letters: those of the text, as written: math-verify's parser makes lower case of them."""

    expression: Basic
    letters: frozenset[str] = frozenset()


Reading = Word | Numeral | Clock | Percent | Residue | Scaled | Ratio | Choice | Group | Named | Relation | Formula | Fraction

EMPTY_SET = Group(r"\{", (), r"\}")
