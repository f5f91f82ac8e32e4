"""What each reward counts as the right answer."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest

from megatron_rpp.errors import RewardError
from megatron_rpp.reward import arithmetic, exact, math, registry
from megatron_rpp.reward.base import RewardInput


def judge(reward, response: str, answer: str) -> float:
    return reward.score(RewardInput("", response, answer))


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Paris", "Paris", 1.0),
        ("  the  red\n house ", "the red house", 1.0),
        ("Paris", "paris", 0.0),
        ("Paris is it", "Paris", 0.0),
        ("Well... Answer: Paris", "Paris", 1.0),
        ("Answer: Rome. No. Answer: Paris", "Paris", 1.0),
        ("Answer: Paris. No. Answer: Rome", "Paris", 0.0),
        ("#### 7 Answer: 8", "8", 1.0),
        ("8", "so #### 8", 1.0),
        ("", "", 0.0),
        ("Answer:", "Answer:", 0.0),
    ],
)
def test_exact_compares_what_follows_the_last_marker_word_by_word(response: str, answer: str, expected: float) -> None:
    assert judge(exact, response, answer) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Steps: 7+5=12, 12-3=9. Answer: 9", 9),
        ("Answer: 17.", 17),
        ("it is -3", -3),
        ("3-5=-2", -2),
        ("so $1,234.50 in all", Decimal("1234.5")),
        ("18.0", 18),
        (".5", Decimal("0.5")),
        ("1, 2, 3", 3),
        ("(7)", 7),
        ("007", 7),
        ("", None),
        ("no idea", None),
        ("12a", None),
        ("x2", None),
        ("1.2.3", None),
        ("12,34", None),
        ("1e5", None),
        ("5-3", None),
        ("5 - 3", None),
        ("(1+1)-3", None),
        ("2*3", None),
        ("3/4", None),
        ("2^3", None),
        ("7+5=", None),
        ("7 +", None),
        ("18%", None),
        ("--3", None),
        ("17 or 1x", None),
        ("\u0663", None),
        ("\u00b2", None),
        ("17\u00b2", None),
    ],
)
def test_arithmetic_reads_the_last_plain_number_and_no_operand(text: str, value: Decimal | int | None) -> None:
    assert arithmetic.last_number(text) == value


def test_arithmetic_compares_values_exactly_however_long() -> None:
    assert judge(arithmetic, "Answer: 18.00", "18") == 1.0
    assert judge(arithmetic, "Answer: 18.000000000000000000000000001", "18") == 0.0
    digits = "9" * 10_000
    assert judge(arithmetic, digits, digits) == 1.0
    assert judge(arithmetic, digits, digits[:-1] + "8") == 0.0
    assert judge(arithmetic, "no idea", "18") == 0.0


def test_arithmetic_refuses_an_answer_that_is_no_number() -> None:
    with pytest.raises(RewardError, match="the answer 'seven' is not a number"):
        judge(arithmetic, "7", "seven")


RIGHT = [
    (r"so \boxed{18}", "18"),
    (r"\boxed{2} and then \boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt 2}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3, \pi/2)"),
    (r"$\boxed{1,234}$", "1234"),
    (r"\boxed 7", "7"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}"),
    ("Janet makes 9*2 = 18 dollars.\n#### 18", "She sells...\n#### 18"),
    ("#### 1,234", "1234"),
    ("The answer is $\\frac{3}{4}$.", r"\frac{3}{4}"),
    ("She needs 5 of them, so the final answer is 15.", "15"),
    ("<think>it could be \\boxed{3}</think> \\boxed{4}", "4"),
    (r"first \boxed{4}, then \boxed{5", "4"),
    (r"\boxed{2516}", "2516_8"),
    (r"\boxed{\boxed{6}}", "6"),
    (r"{ \boxed{6}", "6"),
    (r"\boxed{\{1, \}2} \boxed{\}}", r"\}"),
    (r"\frac{1}{2}", r"\frac{1}{2}"),
]
WRONG = [
    (r"\boxed{19}", "18"),
    (r"\boxed{18} or rather \boxed{19}", "18"),
    (r"the answer 18 is not it: \boxed{19}", "18"),
    (r"<think>\boxed{4}</think> I do not know", "4"),
    (r"<think>it is \boxed{4}", "4"),
    ("", "4"),
    ("no number here", "4"),
    (r"\boxed{}", "4"),
    (r"\boxed{1011_2}", "1011_3"),
    (r"\boxed{(1,2]}", "(1,2)"),
    (r"\boxed{1,2,3,4,5}", "4"),
    ("#### 19", "#### 18"),
    (r"\boxed{x+1}", "x+2"),
    (r"\boxed{\text{east}}", r"\text{west}"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_math_accepts_equal_answers_in_other_words(response: str, answer: str) -> None:
    assert judge(math, response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_math_refuses_other_answers_and_answers_not_given(response: str, answer: str) -> None:
    assert judge(math, response, answer) == 0.0


def test_finding_the_box_takes_time_linear_in_the_text() -> None:
    """A model that repeats itself is common; a scan from every box to the end would take minutes here."""
    begin = time.monotonic()
    assert judge(math, r"\boxed{7}" + r"\boxed{" * 100_000, "7") == 1.0
    assert time.monotonic() - begin < 10


def test_every_registered_name_has_its_function() -> None:
    assert {name: registry.get(name) for name in registry.REWARDS} == {
        "exact": exact.score,
        "arithmetic": arithmetic.score,
        "math": math.score,
    }


def test_a_reward_may_be_named_by_its_import_path() -> None:
    assert registry.get("megatron_rpp.reward.exact:score") is exact.score
