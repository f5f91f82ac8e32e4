"""One roll-out: engines sample, reward workers score as answers finish, every rank gets every group.

The result depends only on (weights, prompts, step, seed): not on which engine took a prompt, nor on the order in which
answers finished, nor on whether a part of them was already in the ledger of an interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from megatron_rpp.config.ranges import MAX_SECONDS
from megatron_rpp.config.schema import Config
from megatron_rpp.dist.activity import doing
from megatron_rpp.dist.agreement import raise_together
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.errors import DeadlineError, RppError
from megatron_rpp.reward.base import RewardInput, Verdict
from megatron_rpp.reward.pool import RewardPool
from megatron_rpp.rollout.generate import Rollouts, assemble
from megatron_rpp.rollout.request import Sampling
from megatron_rpp.types import Group, Prompt, Response

Progress = Callable[[int, int, int], None]  # responses finished and asked for over all engines (an estimate), tokens written here


@dataclass(frozen=True, slots=True)
class Collector:
    """The parts that a roll-out needs, bound once. pool: None on ranks that lead no engine."""

    cfg: Config
    groups: Groups
    rollouts: Rollouts
    pool: RewardPool | None

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        version: int,
        num_samples: int,
        sampling: Sampling,
        with_greedy: bool = False,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> tuple[Group, ...]:
        """Sampled and scored groups, one for each prompt and in the order of `prompts`, equal on every rank.

        step: what the seeds depend on. version: of the weights; an engine with others refuses. name: of the ledger's entry.
        with_greedy: each group has a greedy response beside.
        Raises: EngineError, StaleWeightsError, DeadlineError; on every rank when it happens on one.
        """
        cfg, error = self.cfg, None
        what = name or f"step {step}"
        num_asked = len(prompts) * (num_samples + with_greedy)
        verdicts_s = cfg.reward.timeout_s * -(-num_asked // cfg.reward.num_workers) + cfg.run.deadline_s  # were each to need its limit
        verdicts_s = min(verdicts_s, MAX_SECONDS)
        mine: list[Response] = []
        if self.pool is not None:
            work = _Scoring(self.pool, num_asked, progress)
            try:
                with doing(f"sampling {what}"):
                    self.rollouts.generate(
                        prompts,
                        step=step,
                        version=version,
                        samples_per_prompt=num_samples,
                        sampling=sampling,
                        with_greedy=with_greedy,
                        name=name,
                        on_response=work.add,
                    )
                with doing(f"scoring {what}"):
                    mine = work.finish(verdicts_s)
            except RppError as raised:
                error = raised
        # A rank without an engine is here at once, and waits for the slowest leader. A leader that falls silent is found by its
        # heartbeat, within run.deadline_s; this is the limit of one that works.
        longest_s = cfg.rollout.deadline_s + verdicts_s + cfg.run.deadline_s
        raise_together(error, groups=self.groups, what=f"roll-out {name or step}", deadline_s=longest_s)
        shares = gather_objects(mine, self.groups.world_cpu, name=f"responses of roll-out {name or step}", deadline_s=cfg.run.deadline_s)
        return assemble(prompts, [response for share in shares for response in share], num_samples, with_greedy=with_greedy)


class _Scoring:
    """Responses of one roll-out on their way through the reward workers."""

    def __init__(self, pool: RewardPool, num_asked: int, progress: Progress | None) -> None:
        self._pool, self._num_asked, self._progress = pool, num_asked, progress
        self._waiting: list[tuple[Response, Future[Verdict]]] = []
        self._tokens = 0

    def add(self, prompt: Prompt, response: Response) -> None:
        """Hand a finished response to the workers; called while others are still being decoded."""
        verdict = self._pool.submit(RewardInput(prompt.text, response.text, prompt.answer, prompt.end))
        self._waiting.append((response, verdict))
        self._tokens += len(response.tokens)
        if self._progress is not None:
            self._progress(len(self._waiting), self._num_asked, self._tokens)

    def finish(self, deadline_s: float) -> list[Response]:
        """All responses with their scores. Raises: DeadlineError when the pool, which bounds every call, does not answer."""
        return [_with_verdict(response, verdict, deadline_s) for response, verdict in self._waiting]


def _with_verdict(response: Response, verdict: Future[Verdict], deadline_s: float) -> Response:
    try:
        given = verdict.result(timeout=deadline_s)
    except TimeoutError:
        raise DeadlineError(
            "the reward pool gave no verdict",
            where=f"scoring {response.prompt_uid}/{response.sample}",
            expected=f"a verdict within {deadline_s:.0f} s",
            fix="raise reward.num_workers if verifiers are slow; their own limit is reward.timeout_s",
        ) from None
    return replace(response, score=given.score, reward_failed=given.reward_failed)
