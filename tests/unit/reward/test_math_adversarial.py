"""Answers that an optimizer would find: texts that look like the reference and are not, and their right neighbors."""

from __future__ import annotations

import time

import pytest

from megatron_rpp.reward import math
from megatron_rpp.reward.base import RewardInput

COLUMN = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"

PROSE = [
    # delimiters of mathematics around the value
    (r"The answer is \(42\).", "42", 1.0),
    (r"**Answer:** \(\frac12\)", "1/2", 1.0),
    ("The answer is\n\\[42\\]", "42", 1.0),
    (r"## Final Answer: \(42\)", "42", 1.0),
    (r"The answer is \(41\).", "42", 0.0),
    # the last formula says what it is the value of
    ("Thus $12+30=42$.", "42", 1.0),
    ("Thus $12+31=42$.", "42", 0.0),
    (r"\[12+30=42\]", "42", 1.0),
    ("so $f(3)=42$", "42", 1.0),
    ("so $|S|=42$", "42", 1.0),
    (r"\[ P(A) = \frac12 \]", "1/2", 1.0),
    (r"$6\cdot7=42$", "42", 1.0),
    (r"$6\cdot7=42$", "6", 0.0),
    # more than one value in the sentence
    ("The answer is 1, 2, and 3.", "1,2", 0.0),
    ("The answers are $1$, $2$, and $3$.", "1,2,3", 1.0),
    ("The answer is 4, or 5.", "4", 0.0),
    ("The answer is 4, or maybe 5.", "4", 0.0),
    ("The answer is 4 or maybe 5.", "5", 0.0),
    ("The answer is 4, but it may be 5.", "4", 0.0),
    ("The answer is 4 when n is odd and 5 otherwise.", "4", 0.0),
    ("The answer is 4 when n is odd and 5 otherwise.", "5", 0.0),
    ("The answer is 4 for n=1, 5 for n=2.", "4", 0.0),
    ("The answer is 4 when n = 2.", "4", 1.0),
    ("The answer is 4, since 1+3=4 and 2+2=4.", "4", 1.0),
    ("The answer is 4, and we are done.", "4", 1.0),
    ("The answer is 42 million.", "42", 0.0),
    ("#### 42 million", "42", 0.0),
    ("#### 42 million", "42000000", 1.0),
    ("The answer is 42 apples that she has left.", "42", 1.0),
    # boxes
    (r"\boxed{x=3} or \boxed{x=-2}", r"x=3 \text{ or } x=-2", 1.0),
    (r"\boxed{3} or \boxed{-2}", "-2, 3", 1.0),
    (r"\boxed{3} or \boxed{-2}", "3", 0.0),
    (r"The answer is \boxed{16", "16", 0.0),
    ("<answer>42</answer>", "42", 1.0),
    ("<answer>41</answer>", "42", 0.0),
    ("The answer is 42<|im_end|>", "42", 1.0),
    (r"The total cost is \$42.", "42", 1.0),
    ("We get 4 million.", "4", 0.0),
    ("We get $4$ million.", "4", 0.0),
    ("We get 4 millipedes.", "4", 1.0),
]
EQUAL = [
    # rows of a matrix
    (r"\begin{pmatrix}1\\2\end{pmatrix}", COLUMN),
    (r"\begin{pmatrix} 1 \\[6pt] 2 \end{pmatrix}", COLUMN),
    # signs of the sample points
    ("|x||y|", "|xy|"),
    (r"\sqrt{x^2y^2}", "|xy|"),
    # units, and words that multiply
    (r"5\text{ cm}^2", "5"),
    (r"5\text{ square feet per hour}", "5"),
    (r"5\text{ km/h}", "5"),
    ("5 apples", "5"),
    ("5 million", "5000000"),
    (r"5\text{ million dollars}", "5000000"),
    ("5000000", r"5\text{ million}"),
    ("5", r"5\text{ million}"),
    (r"5\text{ million}", "5 million"),
    ("2 dozen", "24"),
    # names and letters
    (r"\text{Area} = 5", "5"),
    ("f(3) = 5", "5"),
    ("P(A) = 5", "5"),
    (r"A \cap B = 5", "5"),
    ("x_1 = 5", "5"),
    ("|AB| = 5", "5"),
    ("East", "east"),
    ("NO", "no"),
    ("ab", "ba"),
    ("AB", "AB"),
    (r"a\cdot b\cdot c", "cab"),
    ("a - b", "-b+a"),
    ("x - y", "-y+x"),
    ("-cd+ab", "ab-cd"),
    ("x y", "xy"),
    # pairs, with and without names
    ("a=2, b=3", "(2,3)"),
    ("(2,3)", "a=2, b=3"),
    ("b=3, a=2", "(2,3)"),
    ("b=3, a=2", "a=2, b=3"),
    ("2, 5", "x=2, y=5"),
    ("x=5, x=2", "2, 5"),
    ("k=2, n=3", "(n,k)=(3,2)"),
    ("(n,k)=(3,2)", "k=2, n=3"),
    ("1,2", "(1,2)"),
    ("(1,2)", "1,2"),
    # brackets and sums
    ("((((5))))", "5"),
    (r"\sum_{k=1}^{4} k", "10"),
    (r"\int_0^1 x^2 dx", "1/3"),
    # bases
    ("1011", "1011_2"),
    (r"1011_{\text{two}}", "1011_2"),
    ("(1011)_2", "1011_2"),
    ("1011 base 2", "1011_2"),
    (r"1011\text{ base }2", "1011_2"),
    # dots, moduli
    (r"0.333\ldots", r"0.\overline{3}"),
    ("0.333...", r"0.\overline{3}"),
    ("0.1666...", r"\frac16"),
    (r"1,2,3,\ldots", r"1,2,3,\dots"),
    (r"7 \pmod{12}", "7"),
    (r"x\equiv 7\pmod{12}", "7"),
    (r"7 \pmod{12}", r"x\equiv 7 \pmod{12}"),
    # sets in other forms
    (r"x\in[2,\infty)", r"x\ge 2"),
    (r"x\in(-3,5)", "-3<x<5"),
    (r"\{x\mid x\ge2\}", r"[2,\infty)"),
    # signs and styles before a value
    ("= 12", "12"),
    (r"\therefore 12", "12"),
    (r"\Rightarrow 12", "12"),
    (r"\large 12", "12"),
    (r"\textcolor{red}{12}", "12"),
    (r"\text{No solution.}", r"\emptyset"),
    (r"\mathbf{32,\!760}", r"32,\!760"),
    (r"\textbf{32{,}760}", "32760"),
    # sums that name what was asked for
    ("a+b = 5", "5"),
    ("ab - c = 5", "5"),
    # roots, binomials, repeating decimals, units
    (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}"),
    (r"\ln x+\ln y", r"\ln(xy)"),
    (r"\sqrt{x^3}", r"x\sqrt x"),
    ("6*sqrt(2)", r"6\sqrt2"),
    ("6sqrt(2)", r"6\sqrt2"),
    (r"{10 \choose 3}", "120"),
    (r".\overline{3}", "1/3"),
    (r"5/12=0.41\overline{6}", "5/12"),
    ("12 min", "12"),
    ("18 USD", "18"),
    (r"24\text{ N}\cdot\text{m}", "24"),
    (r"\cos n\pi", "(-1)^n"),
    ("(-1)^{n+2}", "(-1)^n"),
    ("(ab)^n", "a^nb^n"),
]
DIFFERENT = [
    (r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", COLUMN),
    (r"\begin{pmatrix} 3 \end{pmatrix}", COLUMN),
    ("|x||y|", "xy"),
    ("|xy|", "xy"),
    (r"\sqrt{x^2y^2}", "xy"),
    (r"|\frac ab|", r"\frac ab"),
    # words after a number that are no unit
    (r"5\text{, 6, 7, or 8}", "5"),
    (r"5\text{00}", "5"),
    (r"5\text{.5}", "5"),
    (r"5\text{ or six}", "5"),
    (r"5\text{ (or maybe 6)}", "5"),
    (r"5\text{ and a half}", "5"),
    (r"5\text{ hours 30 minutes}", "5"),
    (r"5\text{ is wrong}", "5"),
    (r"5\text{ is wrong} + 0", "5"),
    (r"5\text{!}", "5"),
    (r"5\text{?}", "5"),
    (r"5\text{%}", "5"),
    (r"5\mathrm{or 6}", "5"),
    ("5 is incorrect", "5"),
    ("5 plus one", "5"),
    ("5 times two", "5"),
    ("5 choose two", "5"),
    ("5 possibly six perhaps seven", "5"),
    ("16 over seventeen", "16"),
    ("16 divided by two", "16"),
    ("16 more than", "16"),
    ("16 might be wrong", "16"),
    ("5 million", "5"),
    (r"5\text{ thousand}", "5"),
    (r"5\text{ dozen}", "5"),
    ("5 million", r"5\text{ thousand}"),
    ("3 cubed", "3"),
    (r"3\text{ halves}", "3"),
    # left sides that name nothing
    ("4 5 = 5", "5"),
    ("1 2 = 5", "5"),
    ("4? = 5", "5"),
    ("?=5", "5"),
    (r"\text{6 or 7} = 5", "5"),
    (r"\text{anything but } = 5", "5"),
    (r"\text{not } = 5", "5"),
    ("D=C", "C"),
    # words are no products, and letters have case
    ("CAB", "BCA"),
    ("TTH", "HTT"),
    ("east", "seat"),
    ("ON", "NO"),
    ("X+Y", "x+y"),
    ("n", "N"),
    ("a - b", "b - a"),
    # pairs
    ("y=2, x=3", "(2,3)"),
    ("b=2, a=3", "(2,3)"),
    ("5,2", "x=2, y=5"),
    ("k=3, n=2", "(n,k)=(3,2)"),
    ("1,2", "(1,2]"),
    ("(1,2]", "1,2"),
    (r"\pm 3", "(3,-3)"),
    ("2 or 3", "(2,3)"),
    ("x=2, x=3", "(2,3)"),
    # brackets that do not close
    ("((5)", "5"),
    ("(5}", "5"),
    # bases
    ("5_7", "5"),
    ("12_5", "12"),
    (r"12\text{ base 7}", "12_8"),
    (r"12\text{ base 7}", "12"),
    ("1011", "11_2"),
    # dots, primes, denied values
    ("5...", "5"),
    (r"5\ldots", "5"),
    ("1,2,3...", "1,2,3"),
    ("0.333", "0.333..."),
    ("5'", "5"),
    (r"\not= 16", "16"),
    (r"\ne 16", "16"),
    ("< 16", "16"),
    (r"7 \pmod{12}", r"7 \pmod{13}"),
    (r"x\in(2,\infty)", r"x\ge 2"),
    # equations that name nothing
    ("x^2+y^2=25", "25"),
    ("x^y=3", "3"),
    ("2a+7b=3", "3"),
    # laws of roots, where they do not hold
    (r"\sqrt{x}\sqrt{y}", r"\sqrt{x+y}"),
    (r"\sqrt{x^2}", "x"),
    (r"\ln x+\ln y", r"\ln(x+y)"),
    (r"\ln(x^2)", r"\ln x"),
    ("(-1)^{n+1}", "(-1)^n"),
    (r"\cos n\pi", "(-1)^{2n}"),
    ("5..", "5"),
]
SLOW = [
    (r"\sum_{k=0}^{n}\binom nk", "2^n"),
    (r"\int_0^1\frac{\ln(1+x)}{1+x^2}dx", r"\frac{\pi\ln 2}{8}"),
    ("[" * 50 + "1" + "]" * 50, "2"),
    ("{" * 900, "2"),
    ("(" * 900, "2"),
    (r"\left(" * 150, "2"),
]


@pytest.mark.parametrize(("response", "answer", "score"), PROSE)
def test_statements_in_prose(response: str, answer: str, score: float) -> None:
    assert math.score(RewardInput("", response, answer)) == score


@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_the_same_answer_in_another_form(response: str, answer: str) -> None:
    assert math.score(RewardInput("", rf"\boxed{{{response}}}", answer)) == 1.0


@pytest.mark.parametrize(("response", "answer"), DIFFERENT)
def test_an_answer_that_only_looks_like_the_reference(response: str, answer: str) -> None:
    assert math.score(RewardInput("", rf"\boxed{{{response}}}", answer)) == 0.0


@pytest.mark.parametrize(("response", "answer"), SLOW)
def test_what_would_take_long_is_refused_at_once(response: str, answer: str) -> None:
    begin = time.monotonic()
    assert math.score(RewardInput("", rf"\boxed{{{response}}}", answer)) == 0.0
    assert math.score(RewardInput("", f"The answer is {response}", answer)) == 0.0
    assert time.monotonic() - begin < 2
