"""What a run says about the shaping of its scores."""

from __future__ import annotations

import pytest

from megatron_rpp.config.schema import Reward
from megatron_rpp.credit import truncation_warning
from megatron_rpp.types import FinishReason, Group, Prompt, Response


def response(sample: int, score: float, end: FinishReason) -> Response:
    return Response("p", sample, (1,), (0.0,), "", end, 0, score)


def group(*responses: Response, greedy: Response | None = None) -> Group:
    return Group(Prompt("p", (1,), "", ""), responses, greedy)


HARMLESS = group(response(0, -1.0, "stop"), response(1, 1.0, "length"), response(2, 0.0, "length"))
WRONG_AND_CUT = response(3, -1.0, "length")


@pytest.mark.parametrize("found", [group(WRONG_AND_CUT), group(response(0, 1.0, "stop"), greedy=WRONG_AND_CUT)], ids=["sampled", "greedy"])
def test_a_coefficient_that_makes_a_negative_score_better_is_told_with_its_remedy(found: Group) -> None:
    said = truncation_warning([HARMLESS, found], Reward(truncated_coef=0.0))
    assert "reward.truncated_coef 0 rewards truncation: response p/3 scored -1, was cut off and gets 0;" in said
    assert "set reward.truncated_score" in said
    assert "gets -0.25;" in truncation_warning([found], Reward(truncated_coef=0.25))


@pytest.mark.parametrize("reward", [Reward(), Reward(truncated_score=-1.0), Reward(truncated_coef=1.0)])
def test_nothing_is_told_where_no_score_gets_better(reward: Reward) -> None:
    assert truncation_warning([HARMLESS, group(WRONG_AND_CUT)], reward) is None
    assert truncation_warning([HARMLESS], Reward(truncated_coef=0.0)) is None
