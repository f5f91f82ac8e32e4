"""When two readings of an answer are equal. docs/rewards.md has the rules in words."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import sympy
from sympy import Basic, Expr, Interval, MatrixBase, Set, Symbol

from megatron_rpp.reward import formulas
from megatron_rpp.reward.kinds import (
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
from megatron_rpp.reward.readings import read_formula

_MAX_ITEMS = 100
# Letters of an unmarked word that may be a product of symbols: against a formula, and against another word.
_MAX_PRODUCT, _MAX_WORD = 4, 2
_OPEN = {"(": True, "[": False, ")": True, "]": False}
_FLIPPED = {"<": ">", r"\le": r"\ge"}


def equal(given: Reading, gold: Reading) -> bool:
    """True if the given answer says what the reference says. Raises: TooLargeError, and what sympy raises."""
    given, gold = _one_of(given), _one_of(gold)
    if isinstance(given, Group) != isinstance(gold, Group):
        given, gold = (_spelled_out(given), gold) if _has_names(gold) else (given, gold)
        given, gold = (given, _spelled_out(gold)) if _has_names(given) else (given, gold)
    if isinstance(given, Named) or isinstance(gold, Named):
        return _equal_named(given, gold)
    if isinstance(given, Choice) or isinstance(gold, Choice):
        return _equal_choices(given, gold)
    if isinstance(given, Residue) or isinstance(gold, Residue):
        return _equal_residues(given, gold)
    if isinstance(given, Scaled) or isinstance(gold, Scaled):
        return _equal_scaled(given, gold)
    if isinstance(given, Percent) or isinstance(gold, Percent):
        return _equal_percents(given, gold)
    if isinstance(given, Group) and isinstance(gold, Group):
        return _equal_groups(given, gold) or _equal_sets(given, gold)
    if isinstance(given, Relation) and isinstance(gold, Relation):
        return _equal_relations(given, gold) or _equal_sets(given, gold)
    if not isinstance(gold, Group | Relation):
        if (value := _only_item(given)) is not None or (value := _right_side(given)) is not None:
            return equal(value, gold)
    elif not isinstance(given, Group | Relation) and (value := _only_item(gold)) is not None:
        return equal(given, value)
    for kind, compare in _COMPARISONS.items():
        if isinstance(given, kind) or isinstance(gold, kind):
            return compare(given, gold)
    left, right = _expression(given), _expression(gold)
    if left is None or right is None or isinstance(left, Set) or isinstance(right, Set):
        return _equal_sets(given, gold)
    return not _differ_in_case(given, gold) and formulas.equal(left, right)


def _one_of(reading: Reading) -> Reading:
    """The value of "7/2 or 3.5", which says one thing twice."""
    if not isinstance(reading, Group) or reading.opening or set(reading.separators) != {"or"}:
        return reading
    first, *others = reading.items[:_MAX_ITEMS]
    is_one = not isinstance(first, Relation) and all(equal(other, first) for other in others)
    return first if is_one else reading


def _expression(reading: Reading) -> Basic | MatrixBase | None:
    if isinstance(reading, Fraction):
        return sympy.Rational(reading.numerator, reading.denominator)
    return reading.expression if isinstance(reading, Formula) else None


def _differ_in_case(given: Reading, gold: Reading) -> bool:
    """True if a letter is a capital in one of two formulas only, and small in the other only: n and N."""
    if not (isinstance(given, Formula) and isinstance(gold, Formula)):
        return False
    return any(letter.swapcase() in gold.letters - given.letters for letter in given.letters - gold.letters)


def _equal_named(given: Reading, gold: Reading) -> bool:
    """x = 3 equals 3 and x = 3, and not y = 3. A chain whose values differ is no answer."""
    given_value, gold_value = _value(given), _value(gold)
    if given_value is None or gold_value is None:
        return False
    both = isinstance(given, Named) and isinstance(gold, Named)
    are_other_names = both and given.name and gold.name and given.name != gold.name
    if are_other_names or isinstance(given, Relation) or isinstance(gold, Relation):
        if _is_set(given_value) or _is_set(gold_value):  # x in [2, oo), against x >= 2
            return not are_other_names and _equal_sets(given_value, gold_value)
        left, right = _as_relation(given), _as_relation(gold)
        return left is not None and right is not None and _equal_relations(left, right)
    return equal(given_value, gold_value)


def _is_set(reading: Reading) -> bool:
    return isinstance(reading, Group) or (isinstance(reading, Formula) and isinstance(reading.expression, Set))


def _value(reading: Reading) -> Reading | None:
    if not isinstance(reading, Named):
        return reading
    *others, last = reading.values
    return last if all(equal(other, last) for other in others) else None


def _as_relation(reading: Reading) -> Relation | None:
    if isinstance(reading, Named):
        name, value = read_formula(reading.name) if reading.name else None, _expression(reading.values[-1])
        return Relation((name, value), ("=",)) if name is not None and value is not None else None
    return reading if isinstance(reading, Relation) else None


def _only_item(reading: Reading) -> Reading | None:
    """The element of a set of one."""
    return reading.items[0] if isinstance(reading, Group) and reading.opening == r"\{" and len(reading.items) == 1 else None


def _right_side(relation: Reading) -> Reading | None:
    """The value of "m + n = 7": its left side names what was asked for. "2x = 6" and "x^2 + y^2 = 25" name nothing."""
    if not isinstance(relation, Relation):
        return None
    left, right = relation.sides[0], relation.sides[-1]
    if relation.signs != ("=",) or len(left.free_symbols) < 2 or right.free_symbols:
        return None
    factors = {factor for term in sympy.Add.make_args(left.doit()) for factor in sympy.Mul.make_args(term)}
    if any(factor != -1 and not isinstance(factor, Symbol) for factor in factors):
        return None
    return Formula(right)


def _equal_choices(given: Reading, gold: Reading) -> bool:
    """(C) 12 equals C, 12 and (C) 12."""
    if isinstance(given, Choice) and isinstance(gold, Choice):
        return given.letter == gold.letter and equal(given.value, gold.value)
    choice, other = (given, gold) if isinstance(given, Choice) else (gold, given)
    expression = _expression(other)
    if isinstance(expression, Symbol) and len(expression.name) == 1:
        return choice.letter == expression.name.lower()
    return equal(choice.value, gold) if choice is given else equal(given, choice.value)


def _equal_percents(given: Reading, gold: Reading) -> bool:
    """50% equals 50%, 50 and 0.5."""
    if isinstance(given, Percent) and isinstance(gold, Percent):
        return equal(given.number, gold.number)
    percent, other = (given, gold) if isinstance(given, Percent) else (gold, given)
    number, value = _expression(percent.number), _expression(other)
    if number is None or value is None:
        return False
    return formulas.equal(number, value) or formulas.equal(number / 100, value)


def _equal_residues(given: Reading, gold: Reading) -> bool:
    """7 (mod 12) equals 7 (mod 12) and 7, and not 7 (mod 13)."""
    if isinstance(given, Residue) and isinstance(gold, Residue):
        return equal(given.modulus, gold.modulus) and equal(given.number, gold.number)
    left, right = (side.number if isinstance(side, Residue) else side for side in (given, gold))
    return equal(left, right)


def _equal_scaled(given: Reading, gold: Reading) -> bool:
    """5 million equals 5000000. Where the reference says 5 million, 5 is right too: the problem may name the unit."""
    if isinstance(gold, Scaled) and not isinstance(given, Scaled) and equal(given, gold.number):
        return True
    left, right = _product(given), _product(gold)
    return left is not None and right is not None and formulas.equal(left, right)


def _product(reading: Reading) -> Expr | None:
    if not isinstance(reading, Scaled):
        return _expression(reading)
    number = _expression(reading.number)
    return number * reading.factor if number is not None else None


def _equal_words(given: Reading, gold: Reading) -> bool:
    if isinstance(given, Word) and isinstance(gold, Word) and given.text == gold.text:
        return True
    most = _MAX_WORD if isinstance(given, Word) and isinstance(gold, Word) else _MAX_PRODUCT
    products = []
    for reading in (given, gold):
        if isinstance(reading, Word):
            if reading.marked or len(reading.letters) > most or (most == _MAX_WORD and reading.letters.isupper()):
                return False
            expression = read_formula(reading.letters)
            reading = None if expression is None else Formula(expression, frozenset(reading.letters))
        products.append(reading)
    return isinstance(products[0], Formula) and isinstance(products[1], Formula) and equal(*products)


def _equal_numerals(given: Reading, gold: Reading) -> bool:
    """1011_2 and 1011, where the response leaves the base out, answer 1011_2; 1011_3 and 11 do not."""
    if not isinstance(gold, Numeral):
        return False
    is_whole = isinstance(given, Fraction) and given.denominator == 1
    return given == gold or (is_whole and str(given) == gold.digits)


def _equal_clocks(given: Reading, gold: Reading) -> bool:
    """12:30 PM equals 12:30. 9 a.m. equals 9."""
    if isinstance(given, Clock) and isinstance(gold, Clock):
        halves = {given.half, gold.half} - {""}
        return given.digits == gold.digits and len(halves) < 2
    clock, other = (given, gold) if isinstance(given, Clock) else (gold, given)
    return bool(clock.half) and isinstance(other, Fraction) and clock.digits == (other, 0)


def _equal_ratios(given: Reading, gold: Reading) -> bool:
    """2:3 equals 4:6, and not 2/3."""
    if not (isinstance(given, Ratio) and isinstance(gold, Ratio)) or len(given.parts) != len(gold.parts):
        return False
    lefts, rights = [_expression(part) for part in given.parts], [_expression(part) for part in gold.parts]
    if None in lefts or None in rights:
        return False
    return all(formulas.equal(left * rights[0], right * lefts[0]) for left, right in zip(lefts, rights, strict=True))


def _equal_groups(given: Group, gold: Group) -> bool:
    """Pairs and vectors in order, lists with the same items as often, sets with the same items."""
    kinds = {given.opening, gold.opening}
    if kinds in ({r"\{", "("}, {r"\{", "["}, {"", "["}) or max(len(given.items), len(gold.items)) > _MAX_ITEMS:
        return False
    if r"\{" in kinds:
        return _contains(given.items, gold.items) and _contains(gold.items, given.items)
    if len(given.items) != len(gold.items):
        return False
    if kinds == {""} and _has_names(gold) and not any(isinstance(item, Named) for item in given.items):
        return all(map(equal, given.items, gold.items))
    if kinds == {""}:
        return _is_permutation(given.items, gold.items)
    if "" in kinds:
        given, gold = (_as_pair(group) for group in (given, gold))
    if given is None or gold is None:
        return False
    brackets = {(group.opening, group.closing) for group in (given, gold)}
    if len(gold.items) == 2 and len(brackets) > 1:
        return False  # an open and a closed interval
    return all(equal(left, right) for left, right in zip(given.items, gold.items, strict=True))


def _has_names(reading: Reading) -> bool:
    """True for a bare list that gives several names a value each: k = 2, n = 3. "x = 2, x = 3" has one name."""
    if not isinstance(reading, Group) or reading.opening or not all(isinstance(item, Named) for item in reading.items):
        return False
    names = {item.name for item in reading.items}
    return len(names) == len(reading.items) and "" not in names


def _spelled_out(reading: Reading) -> Reading:
    """n = 3, k = 2 for "(n,k) = (3,2)"."""
    if not isinstance(reading, Named) or not reading.name.startswith("(") or len(reading.values) != 1:
        return reading
    names, value = reading.name.strip("()").split(","), reading.values[0]
    if not isinstance(value, Group) or value.opening != "(" or len(names) != len(value.items):
        return reading
    items = tuple(Named(name, (item,)) for name, item in zip(names, value.items, strict=True))
    return Group("", items, "", (",",) * (len(items) - 1))


def _as_pair(group: Group) -> Group | None:
    """A bare list as a pair: its items are parted by commas, or have names, which give the order."""
    if group.opening:
        return group
    if _has_names(group):
        return Group("(", tuple(sorted(group.items, key=lambda item: item.name)), ")")
    is_pair = group.separators == (",",) * (len(group.items) - 1) and not any(isinstance(item, Named) for item in group.items)
    return Group("(", group.items, ")") if is_pair else None


def _contains(items: Sequence[Reading], others: Sequence[Reading]) -> bool:
    return all(any(equal(item, other) for item in items) for other in others)


def _is_permutation(given: Sequence[Reading], gold: Sequence[Reading]) -> bool:
    left = list(given)
    for wanted in gold:
        place = next((place for place, item in enumerate(left) if equal(item, wanted)), None)
        if place is None:
            return False
        del left[place]
    return True


def _equal_relations(given: Relation, gold: Relation) -> bool:
    """The same relations in any order, each up to a constant factor: x > 3 equals 6 < 2x."""
    rest = _differences(gold)
    for difference, sign in _differences(given):
        matches = (place for place, (other, kind) in enumerate(rest) if kind == sign and _is_multiple(difference, other, sign))
        if (place := next(matches, None)) is None:
            return False
        del rest[place]
    return not rest


def _differences(relation: Relation) -> list[tuple[Basic, str]]:
    """Each link of the chain as difference and sign, ">" or "\\ge" for inequalities."""
    found = []
    for left, right, sign in zip(relation.sides, relation.sides[1:], relation.signs, strict=False):
        left, right = (right, left) if sign in _FLIPPED else (left, right)
        found.append((left - right, _FLIPPED.get(sign, sign)))
    return found


def _is_multiple(difference: Basic, other: Basic, sign: str) -> bool:
    factor = formulas.ratio(difference, other)
    return factor is not None and (sign in ("=", r"\ne") or bool(factor.is_positive))


def _equal_sets(given: Reading, gold: Reading) -> bool:
    """Sets of numbers in any notation: x < 3 equals (-\\infty, 3)."""
    left, right = _as_set(given), _as_set(gold)
    if left is None or right is None:
        return False
    if isinstance(left, Interval) and isinstance(right, Interval):
        same_ends = left.left_open == right.left_open and left.right_open == right.right_open
        return bool(same_ends) and formulas.equal(left.start, right.start) and formulas.equal(left.end, right.end)
    return left == right or left.symmetric_difference(right).is_empty is True


def _is_union(group: Group) -> bool:
    return bool(group.items) and not group.opening and all(isinstance(item, Relation) for item in group.items)


def _as_set(reading: Reading) -> Set | None:
    if isinstance(reading, Formula) and isinstance(reading.expression, Set):
        return formulas.evaluated(reading.expression)
    if isinstance(reading, Relation):
        symbols = set().union(*(side.free_symbols for side in reading.sides))
        links = [_half_line(*link) for link in zip(reading.sides, reading.sides[1:], reading.signs, strict=False)]
        return None if None in links or len(symbols) != 1 else sympy.Intersection(*links)
    if not isinstance(reading, Group):
        return None
    if _is_union(reading):
        parts = [_as_set(item) for item in reading.items]
        joint = {"or": sympy.Union, "and": sympy.Intersection}.get("".join(set(reading.separators)))
        return None if None in parts or joint is None else joint(*parts)
    ends = [_expression(item) for item in reading.items]
    if None in ends or any(isinstance(end, Set | MatrixBase) or end.free_symbols for end in ends):
        return None
    ends = [formulas.evaluated(end) for end in ends]
    if reading.opening == r"\{":
        return sympy.FiniteSet(*ends)
    if len(ends) != 2 or not reading.opening:
        return None
    if not all(end.is_extended_real for end in ends) or not ends[0] < ends[1]:
        return None
    return Interval(*ends, left_open=_OPEN[reading.opening], right_open=_OPEN[reading.closing])


def _half_line(left: Basic, right: Basic, sign: str) -> Set | None:
    """The real numbers for which an inequality holds that is solved for its symbol."""
    if isinstance(right, Symbol):
        left, right = right, left
        sign = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}.get(sign, sign)
    if not isinstance(left, Symbol) or right.free_symbols:
        return None
    bound = formulas.evaluated(right)
    if sign in ("=", r"\ne"):
        return sympy.FiniteSet(bound) if sign == "=" else sympy.S.Reals - sympy.FiniteSet(bound)
    if sign in ("<", r"\le"):
        return Interval(-sympy.oo, bound, right_open=sign == "<")
    return Interval(bound, sympy.oo, left_open=sign == ">")


_COMPARISONS = {Word: _equal_words, Numeral: _equal_numerals, Clock: _equal_clocks, Ratio: _equal_ratios}
