"""The groups of one step: those of the next prompts, or with dynamic sampling those that have something to teach.

A prompt whose responses all have the same raw score says nothing to an estimator that compares them. With
rollout.keep_groups: informative such groups are left out and other prompts are sampled in their place, until the step has
rollout.prompts_per_step groups or rollout.max_refills further roll-outs have been made.
Source: DAPO arXiv 2503.14476 section 3.2. Told by max == min of the raw scores: OpenRLHF's 0 < mean < 1 holds for scores of
0 and 1 only, and the deviation of equal floats is not 0 (NeMo-RL, slime).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rpp.config.schema import Rollout
from megatron_rpp.data.prompts import PromptStream
from megatron_rpp.types import Group, Prompt

# (prompts, number of the refill, from 0) -> their groups, equal on every rank
Collect = Callable[[Sequence[Prompt], int], tuple[Group, ...]]

# At most so many prompts are drawn for one that is missing, however few of those before were informative.
MAX_OVERDRAW = 8


@dataclass(frozen=True, slots=True)
class Drawn:
    """kept: what the step trains on. sampled: all groups of the step, those left out among them. refills: roll-outs after the first."""

    kept: tuple[Group, ...]
    sampled: tuple[Group, ...]
    refills: int

    @property
    def informative_frac(self) -> float:
        """Sampled groups whose scores differ."""
        return sum(not group.is_even for group in self.sampled) / len(self.sampled)

    @property
    def truncated_frac(self) -> float:
        """Sampled responses that the length limit ended."""
        responses = [response for group in self.sampled for response in group.responses]
        return sum(response.is_truncated for response in responses) / len(responses)


def draw(prompts: PromptStream, collect: Collect, rollout: Rollout, *, least: int) -> Drawn:
    """Sample the groups of one step. Every rank calls this and comes to the same answer.

    A refill draws as many prompts as are missing, divided by the fraction that was informative so far; a prompt that the step
    has drawn already is not drawn again. What a last refill brings too much is left out.
    least: groups the step cannot do without (one for each minibatch). Where the cap leaves fewer, groups without a difference
    fill up: an estimator that compares them learns nothing from those, and the run goes on.
    """
    wanted = rollout.prompts_per_step
    sampled = list(collect(prompts.take(wanted), 0))
    if rollout.keep_groups == "all":
        return Drawn(tuple(sampled), tuple(sampled), 0)
    kept, refills = [group for group in sampled if not group.is_even], 0
    while len(kept) < wanted and refills < rollout.max_refills:
        seen = frozenset(group.prompt.uid for group in sampled)
        share = max(len(kept) / len(sampled), 1 / MAX_OVERDRAW)
        count = min(math.ceil((wanted - len(kept)) / share), wanted, prompts.num_without(seen))
        if count == 0:
            break  # the whole set has been drawn
        refills += 1
        groups = collect(prompts.take(count, without=seen), refills)
        sampled += groups
        kept += [group for group in groups if not group.is_even]
    others = [group for group in sampled if group.is_even]
    kept += others[: max(0, least - len(kept))]
    return Drawn(tuple(kept[:wanted]), tuple(sampled), refills)
