"""What a step's record says of its responses, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_rpp.observe.rollout import rollout_metrics
from megatron_rpp.types import Group, Prompt, Response


def response(score: float, tokens: int, *, reason: str = "stop", failed: str | None = None) -> Response:
    return Response("p", 0, (5,) * tokens, (-1.0,) * tokens, "", reason, 0, score=score, reward_failed=failed)


def group(*responses: Response, domain: str = "a", greedy: Response | None = None) -> Group:
    return Group(Prompt("p", (1, 2, 3), "", "", domain=domain), responses, greedy)


ONE = group(response(1.0, 2), response(0.0, 4, reason="length"))
TWO = group(response(0.0, 1, failed="timeout"), response(0.0, 1), domain="b")


def test_scores_are_of_all_that_was_sampled_and_sizes_of_what_is_kept() -> None:
    """1 0 0 0: mean 1/4, squares 1/4, variance 1/4 - 1/16 = 3/16. Kept: 6 tokens, after 3 of the prompt twice."""
    got = rollout_metrics((ONE, TWO), (ONE,))
    assert got == {
        "score/mean": 0.25,
        "score/std": pytest.approx(math.sqrt(3 / 16)),
        "score/solved_frac": 0.25,
        "score/even_groups_frac": 0.5,
        "score/failed_frac": 0.25,
        "response/tokens_mean": 2.0,
        "response/tokens_max": 4.0,
        "response/truncated_frac": 0.25,
        "batch/prompts": 1.0,
        "batch/responses": 2.0,
        "batch/response_tokens": 6.0,
        "batch/tokens": 12.0,
        "score/domain/a": 0.5,
        "score/domain/b": 0.0,
    }


def test_a_lone_response_is_even_with_nothing_but_a_greedy_one() -> None:
    lone = group(response(1.0, 2))
    same, other = replace(lone, greedy=response(1.0, 3)), replace(lone, greedy=response(0.0, 3))
    assert rollout_metrics((lone, lone), (lone,))["score/even_groups_frac"] == 0.0
    assert rollout_metrics((lone, same, other), (lone,))["score/even_groups_frac"] == 0.5
