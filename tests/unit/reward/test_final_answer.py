"""Where reward math and reward arithmetic look for the final answer of a response."""

from __future__ import annotations

import time

import pytest

from megatron_rpp.reward import arithmetic, exact, math
from megatron_rpp.reward.base import RewardInput
from megatron_rpp.reward.final_answer import explicit_answer, is_mathematics, stated_answer

TEMPLATE_END = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # boxes
        (r"\boxed{125} and \boxed{216}", "125, 216"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"$a=\boxed{1}$ and $b=\boxed{2}$", "1, 2"),
        (r"maybe \boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{7}, \boxed{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        # the marker of GSM8K and Markdown's headings
        ("12+30=42\n#### 42", "42"),
        ("#### $1,042.00\nin all", "$1,042.00"),
        ("#### -7%\nbelow zero", "-7%"),
        ("#### \\frac{1}{2}\nas computed", r"\frac{1}{2}"),
        ("#### 42 boxes", "42 boxes"),
        ("#### Paris\n\n", "Paris"),
        ("#### Answer: 42\nand so on", "42"),
        ("#### **The final answer is 42**\nand so on", "42"),
        ("#### Final answer\n\n**42**\n\nDone.", "42"),
        ("#### 5\n#### Step 2: check\nfine", "5"),
        ("#### Step 1: count\n12 boxes.\n#### Step 2: add\n12+30=42", None),
        ("#### 2. Add them\n12+30=42", None),
        ("#### 3 cases\nFirst, ...", None),
        ("##### 42", None),
        ("#####42\nx", None),
        ("it is #### 42 there", None),
        ("#### Final answer\n\nThe total is large.", None),
    ],
)
def test_explicit_answers(text: str, answer: str | None) -> None:
    assert explicit_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is 1. the answer is 2.", "2"),
        ("The answer is $\\frac{1}{2}$, because of that", r"\frac{1}{2}"),
        ("Answer: 3.5; next", "3.5"),
        ("the answers are 1 and 2.\nDone", "1 and 2"),
        ("The answer is 42! Good.", "42"),
        (r"The answer is $11,\! 111$.", r"11,\! 111"),
        ("The answer is $5!$.", "5!"),
        ("Answer:\n\\[\nx = 5\n\\]", "x = 5"),
        ("Answer:\n$$\nx = 5\n$$", "x = 5"),
        ("no statement", None),
    ],
)
def test_stated_answers(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


def test_mathematics_has_no_words() -> None:
    assert is_mathematics(r"3 \text{ cm} and \sqrt{2}")
    assert not is_mathematics("42 of them")
    assert not is_mathematics("1 + 2 =")


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("So the answer is __42__", "42", 1.0),
        ("Therefore the answer is `42`.", "42", 1.0),
        ("the answer is \u22129", "-9", 1.0),
        ("the answer is \u22129", "9", 0.0),
        ("the answer is 1 1/4", "5/4", 1.0),
        ("the answer is 1 1/4", "1/4", 0.0),
        ("So we get 1 1/4 cups", "5/4", 1.0),
        ("So we get 1\u00bd cups", r"\frac12", 0.0),
        ("the answer is 1 2", "2", 0.0),
        ("The answer is east.", r"\text{east}", 1.0),
        ("The answer is 42 apples.", "42", 1.0),
        ("$1$, $2$, $3$", "3", 0.0),
        ("$125$ and $216$", "125, 216", 1.0),
        ("so 3.14", r"\pi", 0.0),
        ("so $x = 3$", "3", 1.0),
        ("so $1 < x < 3$", "(1,3)", 1.0),
        ("so $(1,3)$", "(1,3)", 1.0),
        ("The answer is: $$x = 5$$", "5", 1.0),
        ("Answer: C) 12", "12", 1.0),
        ("Answer: C) 12", "C", 1.0),
        ("Answer: B. 12", "C", 0.0),
    ],
)
def test_answers_in_prose(response: str, answer: str, score: float) -> None:
    assert math.score(RewardInput("", response, answer)) == score


@pytest.mark.parametrize("reward", [math, arithmetic, exact])
@pytest.mark.parametrize(
    ("response", "prompt_end", "score"),
    [
        ("42", "", 1.0),
        ("42", TEMPLATE_END, 0.0),
        ("6*7 = 41?\n</think>\n42", TEMPLATE_END, 1.0),
        ("42\n</think>\nno idea", TEMPLATE_END, 0.0),
        ("42", "<think>\n\n</think>\n\n", 1.0),
        ("<think>42", "", 0.0),
        ("<think>41</think>42", "", 1.0),
        ("<think>41</think>42 <think> or", "", 0.0),
    ],
)
def test_a_thought_that_is_still_open_has_no_answer(reward, response: str, prompt_end: str, score: float) -> None:
    assert reward.score(RewardInput("", response, "42", prompt_end)) == score


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("**Answer: 9**", 9),
        ("__9__", 9),
        ("***9***.", 9),
        ("Answer: `-9`", -9),
        ("Answer: $9$", 9),
        (r"\boxed{-9}", -9),
        (r"-\boxed{9}", -9),
        ("\u22129", -9),
        ("\u20139", -9),
        ("\uff0d\uff19", -9),
        ("\u20149", 9),
        ("it is 9 \u2013 done", 9),
        ("Answer:9", 9),
        ("5, 120", 120),
        ("2 ** 9", None),
        ("2*3*4", None),
        ("5 \u00d7 3", None),
        ("5 \u00b7 3", None),
        ("6 \u00f7 3", None),
        ("6\u22153", None),
        ("5\u22123", None),
        ("5 \u2013 3", None),
        ("5 - (3)", None),
        ("$5 - $3", None),
        ("5\u20143", None),
        ("\u221a9", None),
        (r"\sqrt{9}", None),
        ("sqrt(9)", None),
        (r"\frac{1}{9}", None),
        ("\u00b19", None),
        ("9!", None),
        ("(9)!", None),
        ("9\u00b2", None),
        ("9\u207b\u00b9", None),
        ("9 \u00bd", None),
        ("9 %", None),
        ("9 \u2030", None),
        ("9:30", None),
        ("9 000", None),
        ("9\u00a0000", None),
        ("9\u202f500", None),
        (r"9\%", None),
        (r"9 \%", None),
        (r"\sqrt 9", None),
        (r"\pm 9", None),
        (r"5 \times 9", None),
        (r"9\pi", None),
        (r"$9$ \times", None),
        (r"9\over x", None),
        ("9\u00b0", None),
        ("9 million", None),
        ("minus 9", None),
        ("\u2260 9", None),
        ("!= 9", None),
        (r"9\text{ apples}", 9),
        (r"\Rightarrow 9", 9),
        ("9 apples", 9),
        ("<answer>9</answer>", 9),
        ("9</s>", 9),
        ("9<|im_end|>", 9),
        ("\u0669", None),
    ],
)
def test_arithmetic_reads_typographic_signs_as_what_they_are(text: str, value: int | None) -> None:
    assert arithmetic.last_number(text) == value


HOSTILE = {
    "open boxes": r"\boxed{" * 140_000,
    "list of boxes": ",".join(rf"\boxed{{{number}}}" for number in range(60_000)),
    "nested parentheses": r"\boxed{" + "(" * 450 + "1" + ")" * 450 + "}",
    "nested braces": r"\boxed{" + "{" * 450 + "1" + "}" * 450 + "}",
    "headings": "#### Step\n" * 100_000,
    "labels": "#### Answer\n" * 80_000,
    "statements": "the answer is " * 70_000,
    "dollars": "$" * 1_000_000,
    "asterisks": " **a" * 250_000,
    "one word": "a" * 1_000_000,
    "digits": "9" * 1_000_000,
    "digits in a box": r"\boxed{" + "9" * 1_000_000 + "}",
    "blanks": "answer is " + " " * 1_000_000 + "x",
    "lone surrogates": "\ud800 \\boxed{\udfff1\ud800}",
    "control characters": "\\boxed{\x00\x01\x02}",
    "a tower": r"\boxed{9^{9^{9^9}}}",
    "a tower below one": r"\boxed{2^{-10^{9}}}",
    "factorials": r"\boxed{99999999!!!}",
    "a power of a sum": r"\boxed{(x+1)^{999999999}}",
    "a product": r"\boxed{\prod_{n=1}^{1000000} n}",
    "a float": r"\boxed{1e99999999999}",
    "no value": r"\boxed{\frac{0}{0}}",
    "half a command": r"\boxed{\frac}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_scores_zero_in_little_time(name: str) -> None:
    begin = time.monotonic()
    for reward in (math, arithmetic, exact):
        assert reward.score(RewardInput("", HOSTILE[name], "5")) == 0.0
    assert math.score(RewardInput("", r"\boxed{5}", HOSTILE[name])) == 0.0
    assert time.monotonic() - begin < 10
