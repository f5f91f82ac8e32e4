"""One roll-out: engines sample, reward workers score as answers finish, every rank gets every group.

The result depends only on (weights, prompts, step, seed): not on which engine took a prompt, nor on the order in which
answers finished, nor on whether a part of them was already in the ledger of an interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import DeadlineError, RppError
from megatron_rpp.placement import raise_together
from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.rollout.generate import Rollouts, Sampling
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.types import Group, Prompt, Response

Progress = Callable[[int, int], None]  # (responses finished, tokens written) on this rank's engine


@dataclass(frozen=True, slots=True)
class Collector:
    """The parts that a roll-out needs, bound once."""

    groups: Groups
    rollouts: Rollouts
    pool: RewardPool | None  # on leaders
    deadline_s: float
    score_deadline_s: float

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        sampling: Sampling,
        ledger: Ledger | None = None,
        progress: Progress | None = None,
    ) -> tuple[Group, ...]:
        """Sampled and scored groups, one for each prompt and in the order of `prompts`, equal on every rank.

        ledger: where finished responses are appended as they are scored; those already there for this step and
        version are not sampled again.
        Raises: EngineError, DeadlineError; on every rank when it happens on one.
        """
        known = self._known(ledger, step)
        error: RppError | None = None
        mine: list[Response] = []
        if self.rollouts.is_leader:
            try:
                mine = self._sample_and_score(prompts, step, sampling, ledger=ledger, known=known, progress=progress)
            except RppError as raised:
                error = raised
        raise_together(error, groups=self.groups, what=f"roll-out of step {step}", deadline_s=self.deadline_s)
        shares = gather_objects(mine, group=self.groups.world_cpu, name=f"gather responses of step {step}", deadline_s=self.deadline_s)
        return assemble(prompts, [*known.values(), *(response for share in shares for response in share)], sampling.num_samples)

    def _known(self, ledger: Ledger | None, step: int) -> dict[tuple[str, int], Response]:
        """Rank 0 alone reads the ledger, so that all ranks act on one view of a file system that may lag."""
        found: dict[tuple[str, int], Response] | None = None
        if ledger is not None and self.groups.rank == 0:
            found = ledger.load(step, version=self.rollouts.version)
        views = gather_objects(found, group=self.groups.world_cpu, name=f"read the ledger of step {step}", deadline_s=self.deadline_s)
        return views[0] or {}

    def _sample_and_score(
        self,
        prompts: Sequence[Prompt],
        step: int,
        sampling: Sampling,
        *,
        ledger: Ledger | None,
        known: dict[tuple[str, int], Response],
        progress: Progress | None,
    ) -> list[Response]:
        assert self.pool is not None
        prompt_of = {prompt.uid: prompt for prompt in prompts}
        waiting: list[tuple[Response, Future[Verdict]]] = []
        scored: list[Response] = []
        tokens = 0

        def settle(*, everything: bool) -> None:
            """Move scored responses to the ledger as soon as they are scored, so that a kill loses none of them."""
            still = []
            for response, verdict in waiting:
                if everything or verdict.done():
                    scored.append(_with_verdict(response, verdict, self.score_deadline_s))
                    if ledger is not None:
                        ledger.append(step, scored[-1])
                else:
                    still.append((response, verdict))
            waiting[:] = still

        def on_response(response: Response) -> None:
            nonlocal tokens
            prompt = prompt_of[response.prompt_uid]
            asked = RewardInput(prompt=prompt.text, response=response.text, answer=prompt.answer)
            waiting.append((response, self.pool.submit(asked)))
            settle(everything=False)
            tokens += len(response.tokens)
            if progress is not None:
                progress(len(scored) + len(waiting), tokens)

        self.rollouts.generate(prompts, step=step, sampling=sampling, skip=known.keys(), on_response=on_response)
        settle(everything=True)
        return scored


def _with_verdict(response: Response, future: Future[Verdict], deadline_s: float) -> Response:
    try:
        verdict = future.result(timeout=deadline_s)
    except TimeoutError:
        raise DeadlineError(
            "a reward worker gave no verdict",
            where=f"scoring {response.prompt_uid}/{response.sample}",
            expected=f"a verdict within {deadline_s:.0f} s",
            fix="this is a defect of the reward pool: please report it with logs/",
        ) from None
    return replace(response, score=verdict.score, reward_failed=verdict.reward_failed)


def assemble(prompts: Sequence[Prompt], responses: Sequence[Response], num_samples: int) -> tuple[Group, ...]:
    """Groups by prompt uid, samples in order; never by the position in which responses arrived.

    Raises: ValueError when a response is missing, double, or belongs to no prompt: a defect of ours, not of the user.
    """
    by_uid: dict[str, dict[int, Response]] = {prompt.uid: {} for prompt in prompts}
    for response in responses:
        samples = by_uid.get(response.prompt_uid)
        if samples is None or response.sample in samples:
            raise ValueError(f"response {response.prompt_uid}/{response.sample} is double or belongs to no prompt of this step")
        samples[response.sample] = response
    for uid, samples in by_uid.items():
        if sorted(samples) != list(range(num_samples)):
            raise ValueError(f"prompt {uid}: samples {sorted(samples)}, expected 0..{num_samples - 1}")
    return tuple(Group(prompt, tuple(by_uid[prompt.uid][i] for i in range(num_samples))) for prompt in prompts)
