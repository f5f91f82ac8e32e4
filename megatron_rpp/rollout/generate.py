"""All responses of a step, from all engines.

Every rank holds a Rollouts; only the leaders' hold an engine. Each leader keeps its engine full with prompts from the
shared queue and hands every response on the moment it ends. Seeds belong to requests, so the responses do not depend on
which engine took which prompt, nor on what was in its batch (Engine.info.is_seeded says whether the device keeps that).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_rpp.dist.activity import doing
from megatron_rpp.errors import DeadlineError, EngineError, RppError
from megatron_rpp.rollout.engine import POLL_S, Engine
from megatron_rpp.rollout.ledger import Key, Ledger
from megatron_rpp.rollout.queue import WorkQueue
from megatron_rpp.rollout.request import Completion, Request, Sampling, greedy
from megatron_rpp.rollout.seeds import request_seed
from megatron_rpp.types import Group, Prompt, Response

OnResponse = Callable[[Prompt, Response], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits:
    """How long things may take. total_s: one whole `generate`; quiet_s: an engine without any progress."""

    total_s: float = 7200.0
    quiet_s: float = 900.0


@dataclass(slots=True)
class _Call:
    """One `generate` on this leader: what it asked for and what has come of it."""

    prompts: Sequence[Prompt]
    step: int
    version: int
    samplings: tuple[Sampling, ...]  # how each response to a prompt is drawn
    on_response: OnResponse
    name: str
    known: dict[Key, Response]
    first_sample: list[int]  # by prompt; 0 unless the same prompt stands earlier in the list too
    start: float = field(default_factory=time.monotonic)
    missing: dict[int, set[int]] = field(default_factory=dict)  # claimed prompt -> samples still to come
    responses: list[tuple[int, Response]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return len(self.samplings)

    @property
    def num_in_flight(self) -> int:
        return sum(map(len, self.missing.values()))


class Rollouts:
    """Sampling for one rank. engine: None on every rank that leads no engine group."""

    def __init__(
        self,
        engine: Engine | None,
        queue: WorkQueue,
        *,
        seed: int,
        detokenise: Callable[[Sequence[int]], str],
        ledger: Ledger | None = None,
        limits: RolloutLimits = RolloutLimits(),
    ) -> None:
        self.engine, self.queue = engine, queue
        self._seed, self._detokenise, self._ledger, self._limits = seed, detokenise, ledger, limits

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        version: int,
        samples_per_prompt: int,
        sampling: Sampling,
        with_greedy: bool = False,
        name: str | None = None,
        on_response: OnResponse = lambda prompt, response: None,
    ) -> list[Response]:
        """Sample samples_per_prompt responses to each prompt and return those that this rank's engine made.

        To be called on every leader with the same prompts. name: of the ledger's files, "step-000012" by default; what an
        earlier, interrupted call of that name finished at this version is not sampled again. with_greedy: one more response to each
        prompt, the last, is the greedy one.
        on_response: told of each response as soon as it is there, while others are still being decoded.
        Returns: the responses in order of (prompt, sample); empty on a rank without an engine. See `assemble`.
        Raises: StaleWeightsError, EngineError, DeadlineError; EngineError too, within seconds, when another leader gave up.
        """
        if self.engine is None:
            return []
        name = name or f"step-{step:06d}"
        known = self._ledger.load(name) if self._ledger is not None else {}
        samplings = (sampling,) * samples_per_prompt + ((greedy(sampling),) if with_greedy else ())
        call = _Call(prompts, step, version, samplings, on_response, name, known, _first_samples(prompts, len(samplings)))
        self.queue.open(len(prompts))
        try:
            self._run(call)
        except RppError as error:
            self.queue.give_up(str(error))  # the other leaders would wait for this one's prompts
            raise
        return [response for _, response in sorted(call.responses, key=lambda entry: (entry[0], entry[1].sample))]

    def _run(self, call: _Call) -> None:
        is_empty = False
        while call.missing or not is_empty:
            is_empty = is_empty or self._fill(call)
            self._collect(call)
        with doing("waiting for the other engines"):
            self.queue.wait()

    def _fill(self, call: _Call) -> bool:
        """Claim prompts while the engine has room for all samples of one more, or nothing to do. Whether the queue is empty."""
        room = self.engine.settings.max_concurrent
        while call.num_in_flight == 0 or call.num_in_flight + call.samples <= room:
            index = self.queue.claim()
            if index is None:
                return True
            self._start_prompt(call, index)
        return False

    def _start_prompt(self, call: _Call, index: int) -> None:
        prompt = call.prompts[index]
        first = call.first_sample[index]
        call.missing[index] = set(range(first, first + call.samples))
        requests = []
        for sample in range(first, first + call.samples):
            response = call.known.get((prompt.uid, sample, call.version))
            if response is not None:
                self._hand_on(call, index, response)
                continue
            seed = request_seed(self._seed, call.step, prompt.uid, sample)
            requests.append(Request(f"{index}/{sample}", prompt.tokens, seed, call.samplings[sample - first]))
        if requests:
            self.engine.submit(requests, version=call.version)

    def _collect(self, call: _Call) -> None:
        """Wait shortly for responses, and hand on what has come. Raises: DeadlineError when the call or the engine takes too long."""
        self.queue.check()
        if not call.missing:
            return
        finished = [self._response(call, completion) for completion in self.engine.poll(POLL_S)]
        if self._ledger is not None:
            self._ledger.append(call.name, [response for _, response in finished])
        for index, response in finished:
            self._hand_on(call, index, response)
        if self.engine.quiet_s > self._limits.quiet_s:
            raise self.engine.stalled(f"generate {call.name}", self._limits.quiet_s)
        if time.monotonic() - call.start > self._limits.total_s:
            raise self._too_long(call)

    def _response(self, call: _Call, completion: Completion) -> tuple[int, Response]:
        index, sample = map(int, completion.key.split("/"))
        response = Response(
            prompt_uid=call.prompts[index].uid,
            sample=sample,
            tokens=completion.tokens,
            logp_rollout=completion.logp,
            text=self._detokenise(completion.tokens),
            finish_reason=completion.finish_reason,
            version=completion.version,
        )
        return index, response

    def _hand_on(self, call: _Call, index: int, response: Response) -> None:
        call.responses.append((index, response))
        call.on_response(call.prompts[index], response)
        call.missing[index].discard(response.sample)
        if not call.missing[index]:
            del call.missing[index]
            self.queue.finish()

    def _too_long(self, call: _Call) -> DeadlineError:
        waiting = ", ".join(call.prompts[index].uid for index in sorted(call.missing)[:5])
        return DeadlineError(
            f"not finished after {self._limits.total_s:g} s",
            where=f"generate {call.name} on {self.engine.name}",
            expected=f"{len(call.prompts)} prompts, {call.samples} responses to each",
            got=f"{len(call.missing)} of this engine's prompts unfinished ({waiting}); {self.engine.describe_beat()}",
            fix="lower rollout.max_response_tokens or rollout.prompts_per_step, or raise rollout.deadline_s",
        )


def _first_samples(prompts: Sequence[Prompt], samples: int) -> list[int]:
    """Where the numbers of each prompt's samples begin, so that a prompt drawn twice gets other seeds the second time."""
    seen: Counter[str] = Counter()
    firsts = []
    for prompt in prompts:
        firsts.append(seen[prompt.uid] * samples)
        seen[prompt.uid] += 1
    return firsts


def assemble(
    prompts: Sequence[Prompt], gathered: Sequence[Response], samples_per_prompt: int, *, with_greedy: bool = False
) -> tuple[Group, ...]:
    """The responses of all leaders as groups, in the order of the prompts and of `sample`. with_greedy: as in `generate`.

    Raises: EngineError when a response is missing or came twice.
    """
    asked = samples_per_prompt + with_greedy
    found = Counter((response.prompt_uid, response.sample) for response in gathered)
    by_key = {(response.prompt_uid, response.sample): response for response in gathered}
    groups = []
    for prompt, first in zip(prompts, _first_samples(prompts, asked), strict=True):
        keys = [(prompt.uid, sample) for sample in range(first, first + asked)]
        if any(found[key] != 1 for key in keys):
            raise EngineError(
                f"responses to prompt {prompt.uid} are not complete",
                where="gather of the roll-out",
                expected=f"samples {first} to {first + asked - 1}, once each",
                got=sorted(sample for uid, sample in found.elements() if uid == prompt.uid),
                fix="gather from every leader exactly once; otherwise keep the ledger and report it",
            )
        responses = tuple(by_key[key] for key in keys)
        groups.append(Group(prompt, responses[:samples_per_prompt], responses[-1] if with_greedy else None))
    return tuple(groups)
