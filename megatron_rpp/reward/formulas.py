"""Exact equality of sympy expressions. Nothing is rounded: a decimal is the rational number that was written."""

from __future__ import annotations

import math
import random
import re

import sympy
from sympy import Add, Basic, Expr, Float, MatrixBase, Pow, Rational, Symbol
from sympy.core.function import AppliedUndef

MAX_BITS = 200_000  # a number that needs more is never written out
_MAX_EXPONENT = 20_000  # decimal exponent of a float
_SYMBOL_BITS = 16
_FIRST_DIGITS, _GUARD_DIGITS, _MAX_DIGITS = 30, 10, 4_000
_NUM_POINTS, _MIN_POINTS, _MAX_TRIED = 8, 4, 40
# What sympy raises on expressions that it cannot evaluate.
SYMPY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_INFINITE = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


class TooLargeError(ValueError):
    """A number in the expression is too large to write out."""


def evaluated(expression: Basic) -> Basic:
    """The expression with exact numbers, evaluated. Raises: TooLargeError."""
    floats = expression.atoms(Float)
    if floats:
        expression = expression.xreplace({number: as_rational(number) for number in floats})
    _bits(expression)
    return expression.doit()


def as_rational(number: Float) -> Rational:
    """The decimal that was written. Raises: TooLargeError."""
    text = str(number)
    exponent = re.search(r"e([-+]?\d+)$", text)
    if exponent and abs(int(exponent[1])) > _MAX_EXPONENT:
        raise TooLargeError(text)
    return Rational(text)


def equal(left: Basic, right: Basic) -> bool:
    """True if the two have the same value, for all values of their symbols.

    Numbers without symbols are compared to twice as many digits as their integers have, and a hundred more;
    expressions with symbols are compared at random rational points. Raises: TooLargeError, and what sympy raises.
    """
    left, right = (side if isinstance(side, MatrixBase) else evaluated(side) for side in (left, right))
    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        return left.shape == right.shape and all(map(equal, left.flat(), right.flat()))
    if isinstance(left, MatrixBase) or isinstance(right, MatrixBase):
        return False
    if left == right:
        return left is not sympy.nan
    if (left.is_Rational and right.is_Rational) or not (isinstance(left, Expr) and isinstance(right, Expr)):
        return False
    if left.has(*_INFINITE) or right.has(*_INFINITE):
        return False
    if not (left.free_symbols | right.free_symbols):
        return is_zero(left - right)
    return _is_zero_everywhere(left, right)


def is_zero(number: Expr) -> bool:
    """True if a number is zero. Its terms are evaluated to more digits than could cancel by chance.

    Raises: TooLargeError, and what sympy raises.
    """
    if number.is_Rational:
        return number == 0
    terms = Add.make_args(sympy.expand(number))
    bits = sum(max(atom.p.bit_length(), atom.q.bit_length()) for atom in number.atoms(Rational))
    digits = 100 + 2 * int(bits * math.log10(2))
    for precision in (_FIRST_DIGITS, digits):
        if precision > _MAX_DIGITS:
            raise TooLargeError(f"{precision} digits")
        values = [term.evalf(precision, maxn=precision + 100) for term in terms]
        if not all(value.is_number for value in values):
            return False
        scale = max(abs(value) for value in values)
        total = abs(Add(*values)) if len(values) > 1 else scale
        if not total <= scale * Float(10, precision) ** (_GUARD_DIGITS - precision):
            return False
    return True


def _is_zero_everywhere(left: Expr, right: Expr) -> bool:
    """Equal at random points, negative ones among them. Where too few points give a value, sympy must prove it."""
    if left.atoms(AppliedUndef) or right.atoms(AppliedUndef):
        return sympy.simplify(left - right) == 0
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    powers = [node for side in (left, right) for node in side.atoms(Pow)]
    powers = [power for power in powers if power.base.is_negative or power.base.free_symbols]
    whole = {symbol for power in powers for symbol in power.exp.free_symbols}  # the n of (-1)^n and x^n
    points = random.Random(2501)
    agreed = 0
    for number in range(_MAX_TRIED):
        if agreed == _NUM_POINTS:
            break
        at = {one: _coordinate(points, number, place, one in whole) for place, one in enumerate(symbols)}
        if not all(_is_real_at(side, at) for side in (left, right)):
            continue
        values = [side.xreplace(at).doit() for side in (left, right)]
        if any(value.has(*_INFINITE) or not value.is_number for value in values):
            continue
        if not is_zero(values[0] - values[1]):
            return False
        agreed += 1
    return agreed >= _MIN_POINTS or sympy.simplify(left - right) == 0


def _coordinate(points: random.Random, number: int, place: int, is_whole: bool) -> Rational:
    """All signs are plus at the first point, minus at the second; they alternate at the third, then they are random."""
    sign = (1, -1, (-1) ** place)[number] if number < 3 else points.choice((-1, 1))
    if is_whole:
        return Rational(sign * points.randrange(1, 60))
    return sign * Rational(points.randrange(2**13, 2**15), points.randrange(2**11, 2**12))


def _is_real_at(side: Expr, at: dict[Symbol, Rational]) -> bool:
    """False where a logarithm or an even root of a negative number is taken: laws of roots and logarithms fail there."""
    for node in side.atoms(Pow, sympy.log):
        argument = node.args[0].xreplace(at).doit()
        is_root = isinstance(node, sympy.log) or not _has_real_powers(node.exp.xreplace(at).doit())
        if is_root and argument.free_symbols == set() and argument.is_negative:
            return False
    return True


def _has_real_powers(exponent: Expr) -> bool:
    """True for exponents with which a negative number has a real power: integers and odd roots."""
    return exponent.is_Rational and exponent.q % 2 == 1


def ratio(left: Expr, right: Expr) -> Expr | None:
    """The constant c with left = c * right, or None. Raises: TooLargeError, and what sympy raises."""
    left, right = evaluated(left), evaluated(right)
    if left.free_symbols != right.free_symbols:
        return None
    symbols = sorted(left.free_symbols, key=str)
    at = {symbol: Rational(7919 + 2 * place, 3 + place) for place, symbol in enumerate(symbols)}
    top, bottom = (side.xreplace(at).doit() for side in (left, right))
    if not (top.is_number and bottom.is_number) or is_zero(bottom) or is_zero(top):
        return None
    factor = top / bottom
    return factor if equal(left, factor * right) else None


def _bits(expression: Basic) -> int:
    """About how many bits the numbers of the evaluated expression have. Raises: TooLargeError."""
    if isinstance(expression, Rational):
        bits = max(expression.p.bit_length(), expression.q.bit_length())
    elif isinstance(expression, Symbol):
        bits = _SYMBOL_BITS
    elif isinstance(expression, Pow):
        bits = _bits(expression.base) * max(1, _size(expression.exp))
    elif isinstance(expression, sympy.factorial):
        size = _size(expression.args[0])
        bits = size * size.bit_length()
    elif isinstance(expression, sympy.Sum | sympy.Product):
        spans = [end - begin for _, begin, end in expression.limits]
        if any(span.free_symbols for span in spans):
            raise TooLargeError("a number of terms that is not said")
        bits = _bits(expression.function) * math.prod(_size(span) for span in spans if span.is_finite)
    elif isinstance(expression, sympy.Integral) and not expression.function.is_polynomial(*expression.variables):
        raise TooLargeError("an integral that may take for ever")
    elif expression.args:
        bits = sum(_bits(argument) for argument in expression.args)
    else:
        bits = 1
    if bits > MAX_BITS:
        raise TooLargeError(f"more than {MAX_BITS} bits")
    return bits


def _size(exponent: Basic) -> int:
    """The absolute value of a number, rounded up; 1 for what has symbols."""
    if exponent.free_symbols:
        return 1
    _bits(exponent)
    value = exponent.doit()
    if isinstance(value, Rational):
        return -(-abs(value.p) // value.q)
    magnitude = abs(value.evalf(15))
    return int(magnitude) + 1 if magnitude.is_finite and magnitude < MAX_BITS else MAX_BITS + 1
