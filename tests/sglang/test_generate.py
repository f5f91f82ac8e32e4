"""Rollouts over one and over two real engines."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_rpp.dist import store
from megatron_rpp.errors import DeadlineError, EngineError, StaleWeightsError
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.generate import RolloutLimits, Rollouts, assemble
from megatron_rpp.rollout.ledger import Ledger
from megatron_rpp.rollout.queue import WorkQueue
from megatron_rpp.rollout.request import Request, Sampling
from megatron_rpp.types import Prompt, Response
from tests.sglang import tiny

SAMPLING = Sampling(max_tokens=16)
SAMPLES = 4
LONG = Sampling(max_tokens=500, temperature=0.1)


def _prompts(num: int) -> list[Prompt]:
    return [Prompt(hashlib.sha256(str(i).encode()).hexdigest()[:12], tiny.prompt_of(i, 4 + i % 7), "", "") for i in range(num)]


def _words(tokens: tuple[int, ...]) -> str:
    return " ".join(map(str, tokens))


def _rollouts(engine: Engine | None, queue: WorkQueue | None = None, **named: object) -> Rollouts:
    return Rollouts(engine, queue or WorkQueue(), seed=11, detokenise=_words, **named)


def _generate(rollouts: Rollouts, prompts: list[Prompt], **named: object) -> list[Response]:
    return rollouts.generate(prompts, **{"step": 2, "version": 0, "samples_per_prompt": SAMPLES, "sampling": SAMPLING, **named})


@pytest.fixture(scope="module")
def second_engine(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine(slot=1, slots_on_host=2)


def test_every_prompt_gets_its_samples_in_order_and_each_is_different(engine: Engine, model: nn.Module) -> None:
    prompts = _prompts(20)
    responses = _generate(_rollouts(engine), prompts)
    assert [(each.prompt_uid, each.sample) for each in responses] == [(prompt.uid, i) for prompt in prompts for i in range(SAMPLES)]
    assert len({each.tokens for each in responses}) == len(responses)
    for response, prompt in zip(responses, [prompt for prompt in prompts for _ in range(SAMPLES)], strict=True):
        assert response.version == 0
        assert response.text == _words(response.tokens)
        assert response.logp_rollout == pytest.approx(tiny.logp_of(model, prompt.tokens, response.tokens), abs=5e-6)


def test_steps_and_run_seeds_change_what_is_sampled_and_nothing_else_does(engine: Engine) -> None:
    prompts = _prompts(3)
    first = _generate(_rollouts(engine), prompts)
    assert _generate(_rollouts(engine), prompts) == first
    assert {each.tokens for each in _generate(_rollouts(engine), prompts, step=3)}.isdisjoint({each.tokens for each in first})
    other_seed = Rollouts(engine, WorkQueue(), seed=12, detokenise=_words)
    assert {each.tokens for each in _generate(other_seed, prompts)}.isdisjoint({each.tokens for each in first})


def test_a_prompt_that_is_drawn_twice_gets_other_samples_the_second_time(engine: Engine) -> None:
    prompts = [*_prompts(2), _prompts(1)[0]]
    groups = assemble(prompts, _generate(_rollouts(engine), prompts), SAMPLES)
    assert groups[0].prompt == groups[2].prompt
    assert {each.tokens for each in groups[0].responses}.isdisjoint({each.tokens for each in groups[2].responses})
    assert groups[:2] == assemble(prompts[:2], _generate(_rollouts(engine), prompts[:2]), SAMPLES)


def test_responses_are_handed_on_while_others_are_decoded(engine: Engine) -> None:
    seen: list[int] = []
    long = Sampling(max_tokens=200, temperature=3.0)  # ends are common at this temperature, so lengths differ
    _generate(_rollouts(engine), _prompts(6), sampling=long, on_response=lambda prompt, response: seen.append(len(engine.in_flight)))
    assert len(seen) == 6 * SAMPLES
    assert max(seen) > 0


def test_a_rank_without_an_engine_samples_nothing() -> None:
    assert _generate(_rollouts(None), _prompts(3)) == []


def test_two_engines_share_the_work_and_give_what_one_gives(engine: Engine, second_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second leader is held up on its first response: the first takes the rest, and the responses stay the same."""
    for each in (engine, second_engine):  # room for two prompts at a time, so that there is something left to steal
        monkeypatch.setattr(each, "settings", replace(each.settings, max_concurrent=2 * SAMPLES))
    prompts = _prompts(24)
    alone = assemble(prompts, _generate(_rollouts(engine), prompts), SAMPLES)
    host = store.serve("127.0.0.1", 0, 10)
    guest = store.connect("127.0.0.1", host.port, 10)
    results: dict[int, list[Response]] = {}
    first_done: list[float] = []

    def lead(leader: int, engine: Engine, store: object) -> None:
        rollouts = _rollouts(engine, WorkQueue(store, leader=leader, num_leaders=2))

        def on_response(prompt: Prompt, response: Response) -> None:
            if leader == 1 and not first_done:
                first_done.append(time.monotonic())
                time.sleep(3)

        results[leader] = _generate(rollouts, prompts, on_response=on_response)

    threads = [
        threading.Thread(target=lead, args=(i, each, store)) for i, (each, store) in enumerate(((engine, host), (second_engine, guest)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    shares = [len(results[leader]) // SAMPLES for leader in (0, 1)]
    assert sum(shares) == len(prompts)
    assert 1 <= shares[1] < shares[0]
    assert assemble(prompts, results[1] + results[0], SAMPLES) == alone


def test_a_call_resumes_from_the_ledger_without_sampling_again(engine: Engine, tmp_path: Path) -> None:
    prompts = _prompts(5)
    whole = _generate(_rollouts(engine), prompts)
    earlier = [replace(whole[0], text="from the ledger"), replace(whole[5], text="from the ledger"), replace(whole[9], version=7)]
    Ledger(tmp_path, leader=1, vocab_size=tiny.VOCAB).append("step-000002", earlier)
    handed_on: list[tuple[str, int]] = []
    resumed = _generate(
        _rollouts(engine, ledger=Ledger(tmp_path, vocab_size=tiny.VOCAB)),
        prompts,
        on_response=lambda prompt, response: handed_on.append((prompt.uid, response.sample)),
    )
    assert [each.text for each in resumed].count("from the ledger") == 2
    assert [replace(each, text="") for each in resumed] == [replace(each, text="") for each in whole]
    assert sorted(handed_on) == sorted((each.prompt_uid, each.sample) for each in whole)
    assert set(Ledger(tmp_path, vocab_size=tiny.VOCAB).load("step-000002").values()) == {*resumed, earlier[2]}


def test_other_weights_are_refused_before_anything_is_sampled(engine: Engine) -> None:
    with pytest.raises(StaleWeightsError, match="expected: version 1"):
        _generate(_rollouts(engine), _prompts(1), version=1)


def test_a_call_that_takes_too_long_says_what_it_waits_for(engine: Engine) -> None:
    prompts = _prompts(3)
    rollouts = _rollouts(engine, limits=RolloutLimits(total_s=0.3))
    with pytest.raises(
        DeadlineError, match=rf"generate step-000002 on engine-0: not finished after 0.3 s(?s:.*){prompts[0].uid}(?s:.*)last beat"
    ):
        _generate(rollouts, prompts, sampling=Sampling(max_tokens=900))
    engine.abort()
    while engine.in_flight:
        engine.poll(0.2)


def test_long_responses_are_progress_and_not_silence(engine: Engine) -> None:
    """900 tokens take several times the limit on silence."""
    rollouts = _rollouts(engine, limits=RolloutLimits(quiet_s=4.0))
    responses = _generate(rollouts, _prompts(4), samples_per_prompt=8, sampling=Sampling(max_tokens=590))
    assert len(responses) == 32


def test_missing_and_double_responses_are_found_when_they_are_put_together() -> None:
    prompts = _prompts(2)
    responses = [Response(prompt.uid, i, (1,), (0.0,), "", "stop", 0) for prompt in prompts for i in range(2)]
    assert [group.responses for group in assemble(prompts, responses[::-1], 2)] == [tuple(responses[:2]), tuple(responses[2:])]
    with pytest.raises(EngineError, match=rf"{prompts[1].uid} are not complete(?s:.*)got: \[0\]"):
        assemble(prompts, responses[:3], 2)
    with pytest.raises(EngineError, match=r"got: \[0, 0, 1\]"):
        assemble(prompts, [*responses, responses[0]], 2)


def _poll_for_ever(engine: Engine) -> None:
    while True:
        engine.poll(0.5)


def test_a_leader_whose_prompts_will_never_come_is_told_so_while_it_still_decodes(engine: Engine, second_engine: Engine) -> None:
    """The second leader fails on its first response; the first has work for much longer than it takes to hear of it."""
    host = store.serve("127.0.0.1", 0, 10)
    guest = store.connect("127.0.0.1", host.port, 10)
    errors: dict[int, EngineError] = {}

    def fail(prompt: Prompt, response: Response) -> None:
        raise EngineError("the engine's process ended")

    def lead(leader: int, engine: Engine, store: object) -> None:
        rollouts = _rollouts(engine, WorkQueue(store, leader=leader, num_leaders=2))
        try:
            _generate(rollouts, _prompts(24), **({"on_response": fail} if leader == 1 else {}))
        except EngineError as error:
            errors[leader] = error

    threads = [
        threading.Thread(target=lead, args=(i, each, store)) for i, (each, store) in enumerate(((engine, host), (second_engine, guest)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for each in (engine, second_engine):  # both gave up in the middle
        each.abort()
        while each.in_flight:
            each.poll(1)
    assert errors[1].what == "the engine's process ended"
    assert "leader 1: the engine's process ended" in str(errors[0])


def test_death_while_decoding_is_told_within_seconds_with_the_end_of_the_log(second_engine: Engine) -> None:
    engine = second_engine
    engine.submit([Request(f"r{i}", tiny.prompt_of(i), i, LONG) for i in range(8)], version=0)
    worker = next(report["pid"] for report in engine.info.reports if report["role"] == "scheduler")
    os.kill(worker, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"the engine's process ended \(signal SIGKILL\)(?s:.*)end of .*engine-1.log(?s:.*)crashed"):
        _poll_for_ever(engine)
    assert time.monotonic() - start < 10
    with pytest.raises(EngineError, match="is dead"), engine.update(1) as load:
        load([("x", torch.zeros(1))])
    engine.close()
    assert not engine._process.members()
