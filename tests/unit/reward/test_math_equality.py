"""Which answers reward math calls equal, by kind of answer; and properties over numbers of every magnitude."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.reward.math import are_equal

EQUAL = [
    # numbers in other forms
    ("1 1/4", r"\frac{5}{4}"),
    ("5/4", "1 1/4"),
    ("1\u00bd", r"\frac32"),
    (r"-2\frac{1}{2}", "-2.5"),
    ("10 000", "10000"),
    (r"1\,234", "1234"),
    (r"10{,}000", "10,000"),
    (r"\$16,\!386.16", "16386.16"),
    (r"0.1\overline{6}", r"\frac{1}{6}"),
    ("3.2e-7", "0.00000032"),
    (r"1.38\times 10^{-23}", r"13.8\times 10^{-24}"),
    ("1e400", "10^{400}"),
    (r"\frac\pi4", r"\frac{\pi}{4}"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
    (r"\log_2 8", "3"),
    (r"e^{i\pi}", "-1"),
    (r"\sin 32^\circ", r"\cos 58^\circ"),
    (r"33\frac13\%", r"\frac13"),
    # typography
    ("\uff13\uff0e\uff15", "3.5"),
    ("\U0001d7d7", "9"),
    ("\u22126", "-6"),
    ("9\u00b2", "81"),
    ("x\u207b\u00b9", r"\frac{1}{x}"),
    ("x\u2081", "x_1"),
    ("\u221a12", r"2\sqrt{3}"),
    ("2\u03c0", r"2\pi"),
    ("90\u00b0", r"90^{\circ}"),
    (r"\mathbf{42}.", "42"),
    ("**42**", "42"),
    (r"{\pi}", r"\pi"),
    # units and labels
    (r"5^{\text{th}}", "5"),
    (r"6\pi\text{ cm}^3", r"6\pi"),
    ("12 boxes", "12"),
    (r"\angle ABC = 30^\circ", "30"),
    (r"x = \frac{6}{2} = 3", "3"),
    (r"\text{(C) }12", "C"),
    ("(x,y)=(3,4)", "(3,4)"),
    # lists, pairs, sets
    (r"3\pm\sqrt2", r"3+\sqrt2, 3-\sqrt2"),
    (r"\pm 5, 0", "-5, 0, 5"),
    ("1,2,1", "1,1,2"),
    (r"\{1,1,2\}", r"\{1,2\}"),
    (r"\dfrac{7}{2}\text{ or }3.5", "3.5"),
    ("(2,3),(4,5)", "(4,5),(2,3)"),
    # equations, inequalities, intervals
    ("40x+46y=138", "20x + 23y - 69 = 0"),
    ("y=2x+1", "2x-y+1=0"),
    ("6 < 2x", "x > 3"),
    ("x<3", r"(-\infty,3)"),
    (r"[-2,7]", r"-2\le x\le 7"),
    (r"x<-3 \text{ or } x>3", r"(-\infty,-3)\cup(3,\infty)"),
    (r"(1,2]\cup(2,3)", "(1,3)"),
    (r"x\ne 2", r"\mathbb{R}\setminus\{2\}"),
    ("4:6", "2:3"),
    # words and times
    (r"\text{does not exist}", "DNE"),
    ("No solutions", r"\varnothing"),
    (r"\text{red and blue}", "blue, red"),
    (r"\text{all real numbers}", r"\mathbb{R}"),
    (r"\operatorname{lcm}(2,3)", "6"),
    (r"\mathrm{e}^2", "e^2"),
    (r"70\% \text{ or } 0.7", "0.7"),
    (r"1{:}03\text{ p.m.}", r"\text{1:03 PM}"),
    ("ab", "ba"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4.0\end{bmatrix}"),
]
DIFFERENT = [
    ("1 1/4", r"\frac{11}{4}"),
    ("1 2", "12"),
    ("1 2", "2"),
    ("1 2", "3"),
    ("(1 2, 5)", "(12, 5)"),
    (r"1\text{ }2", "12"),
    (r"1\!2", "12"),
    (r"1{}2", "12"),
    ("12 34", "1234"),
    ("0.5 0", "0.50"),
    ("9\u00b2", "92"),
    ("\u0669", "9"),
    ("\u2460", "1"),
    ("(3,100)", "3100"),
    (r"\text{nose}", r"\text{no se}"),
    (r"\text{dessert}", r"\text{tressed}"),
    (r"\frac{\sqrt2}{3^{60}}", r"\frac{\sqrt2}{3^{61}}"),
    (r"\sqrt{2}\cdot 10^{-30}", r"\sqrt{3}\cdot 10^{-30}"),
    ("10^{-400}", "0"),
    ("e^{-1000}", "e^{-1001}"),
    (r"x+\frac{1}{3^{90}}", "x"),
    (r"2^{1000}+\sqrt{2}", "2^{1000}"),
    (r"\sqrt{2^{1000}+1}", "2^{500}"),
    ("3.14159265358979323846", r"\pi"),
    (r"0.5\%", r"50\%"),
    (r"\cos 60", r"\frac12"),
    ("1, 1, 2", "1, 2"),
    ("1, 1, 2", "1, 2, 2"),
    ("(1,2]", "(1,2)"),
    (r"\{1,2\}", "(1,2)"),
    ("(2,1)", "1,2"),
    ("2x=6", "6"),
    ("x=1=2=3", "3"),
    ("3=2", "2"),
    ("a=2,b=3", "a=3,b=2"),
    ("y=5", "x=5"),
    (r"x>1, x<3", "(1,3)"),
    (r"x\le 3", r"(-\infty,3)"),
    (r"\frac23", "2:3"),
    ("3:00", "12:00"),
    ("9 p.m.", r"9\text{ a.m.}"),
    (r"\text{not }3", "3"),
    ("2t", "2"),
    (r"\frac{1}{0}", "5"),
    (r"9^{9^{9^9}}", "2"),
    (r"2^{10^9}", "2^{10^8}"),
    (r"\prod_{n=1}^{1000000} n", "2"),
    ("1e999999999", "5"),
    (r"\sqrt{x^2}", "x"),
    (r"\infty", r"-\infty"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_answers_in_other_forms(left: str, right: str) -> None:
    assert are_equal(left, right)
    assert are_equal(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_answers_that_look_alike(left: str, right: str) -> None:
    assert not are_equal(left, right)
    assert not are_equal(right, left)


def test_e_notation_is_not_a_sum_with_the_number_e() -> None:
    assert are_equal("2e+1", "1+2e")
    assert are_equal("1e+20", "10^{20}")


def test_an_equation_may_name_what_was_asked_but_a_number_does_not_answer_an_equation() -> None:
    assert are_equal("m+n=73", "73")
    assert not are_equal("73", "m+n=73")


EXPONENTS = st.integers(-60, 60)
RATIONALS = st.builds(Fraction, st.integers(-(10**12), 10**12), st.integers(1, 10**12))


def scaled(value: Fraction, exponent: int) -> Fraction:
    return value * Fraction(10) ** exponent


def as_frac(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@settings(max_examples=100, deadline=None)
@given(RATIONALS, RATIONALS, EXPONENTS)
def test_rational_numbers_are_equal_only_if_they_are(left: Fraction, right: Fraction, exponent: int) -> None:
    left, right = scaled(left, exponent), scaled(right, exponent)
    assert are_equal(as_frac(left), as_frac(right)) == (left == right)
    assert are_equal(as_frac(left), f"{left.numerator}/{left.denominator}")


@settings(max_examples=12, deadline=None)
@given(RATIONALS, RATIONALS, EXPONENTS)
def test_multiples_of_an_irrational_are_equal_only_if_the_factors_are(left: Fraction, right: Fraction, exponent: int) -> None:
    left, right = scaled(left, exponent), scaled(right, exponent)
    assert are_equal(rf"{as_frac(left)}\sqrt{{2}}", rf"\sqrt{{2}}\cdot({as_frac(right)})") == (left == right)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**15), 10**15), st.integers(-(10**15), 10**15), st.integers(0, 40))
def test_decimals_are_compared_digit_by_digit(left: int, right: int, places: int) -> None:
    texts = [f"{'-' * (number < 0)}{str(abs(number)).zfill(places + 1)}" for number in (left, right)]
    decimals = [text[: len(text) - places] + "." + (text[len(text) - places :] or "0") for text in texts]
    assert are_equal(*decimals) == (left == right)
    assert are_equal(decimals[0], rf"{left}\times 10^{{-{places}}}")


@settings(max_examples=100, deadline=None)
@given(st.integers(10, 10**9), st.data())
def test_white_space_between_digits_joins_nothing_but_thousands(number: int, data: st.DataObject) -> None:
    digits = str(number)
    place = data.draw(st.integers(1, len(digits) - 1))
    space = data.draw(st.sampled_from((" ", r"\,", r"\ ", "~", r"\;", r"\quad ", "\u00a0", "\u2009", r"\text{ }")))
    is_thousands = len(digits) - place == 3 and place <= 3
    assert are_equal(digits[:place] + space + digits[place:], digits) == is_thousands


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 99), st.integers(1, 99), st.integers(2, 99))
def test_a_mixed_number_is_its_sum_and_never_its_digits_joined(whole: int, top: int, bottom: int) -> None:
    value = whole + Fraction(top, bottom)
    for mixed in (f"{whole} {top}/{bottom}", rf"{whole}\frac{{{top}}}{{{bottom}}}", rf"{whole} \frac{{{top}}}{{{bottom}}}"):
        assert are_equal(mixed, as_frac(value))
        joined = Fraction(int(f"{whole}{top}"), bottom)  # 1 1/10 happens to be 11/10
        assert are_equal(mixed, f"{whole}{top}/{bottom}") == (joined == value)
