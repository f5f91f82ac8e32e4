"""Answers that an optimizer would find: texts that look like the reference and are not, and their right neighbors."""

from __future__ import annotations

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
