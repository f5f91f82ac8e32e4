"""A real engine: what it samples, scores and is told to hold."""

from __future__ import annotations

import copy
import os
import subprocess
import time

import psutil
import pytest
import torch
from torch import nn

from megatron_rpp.errors import EngineError, StaleWeightsError
from megatron_rpp.rollout.engine import UPDATE_S, Engine
from megatron_rpp.rollout.request import Request, Sampling
from megatron_rpp_patches.sglang import PATCHES
from tests.sglang import tiny

LOGP_TOLERANCE = 5e-6


def _other(model: nn.Module) -> nn.Module:
    """Another model of the same shape: every parameter differs."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9).add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return other


def _worst_gap(model: nn.Module, asked: list[Request], done: dict, temperature: float = 1.0) -> float:
    gaps = []
    for request in asked:
        completion = done[request.key]
        expected = tiny.logp_of(model, request.tokens, completion.tokens, temperature)
        gaps += [abs(a - b) for a, b in zip(completion.logp, expected, strict=True)]
    return max(gaps)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_of_sampled_tokens_is_that_of_the_hf_model_at_the_sampling_temperature(
    engine: Engine, model: nn.Module, temperature: float
) -> None:
    asked = tiny.requests(12, temperature=temperature, max_tokens=24)
    assert _worst_gap(model, asked, tiny.sample(engine, asked), temperature) < LOGP_TOLERANCE


def test_logp_is_not_renormalised_when_top_p_cuts_tokens_off(engine: Engine, model: nn.Module) -> None:
    asked = tiny.requests(6, top_p=0.5)
    assert _worst_gap(model, asked, tiny.sample(engine, asked)) < LOGP_TOLERANCE


def test_scores_of_given_tokens_are_those_of_the_hf_model(engine: Engine, model: nn.Module) -> None:
    sequences = [tiny.prompt_of(i, 5 + 3 * i) for i in range(4)]
    for tokens, logp in zip(sequences, engine.score(sequences), strict=True):
        assert logp[0] == 0.0
        assert logp[1:] == pytest.approx(tiny.logp_of(model, tokens[:1], tokens[1:]), abs=LOGP_TOLERANCE)


def test_greedy_takes_the_likeliest_token_of_the_hf_model(engine: Engine, model: nn.Module) -> None:
    asked = tiny.requests(3, temperature=0.0, max_tokens=5)
    for key, done in tiny.sample(engine, asked).items():
        prompt = next(request.tokens for request in asked if request.key == key)
        for i, token in enumerate(done.tokens):
            with torch.no_grad():
                assert model(torch.tensor([[*prompt, *done.tokens[:i]]])).logits[0, -1].argmax().item() == token


def test_the_end_token_is_part_of_the_response_and_has_a_logp(engine: Engine, model: nn.Module) -> None:
    sampling = Sampling(max_tokens=400, temperature=3.0)
    asked = [Request(f"e{i}", tiny.prompt_of(i), i, sampling) for i in range(16)]
    done = tiny.sample(engine, asked)
    stopped = [completion for completion in done.values() if completion.finish_reason == "stop"]
    assert stopped
    for completion in done.values():
        assert (completion.tokens[-1] == tiny.END) == (completion.finish_reason == "stop")
        assert tiny.END not in completion.tokens[:-1]
        assert completion.finish_reason == "stop" or len(completion.tokens) == 400
    assert _worst_gap(model, asked, done, temperature=3.0) < LOGP_TOLERANCE


def test_stop_token_ids_end_a_response_and_belong_to_it(engine: Engine) -> None:
    plain = tiny.sample(engine, tiny.requests(1, max_tokens=20))["p0"]
    cut = plain.tokens[7]
    sampling = Sampling(max_tokens=20, stop_token_ids=(cut,))
    request = tiny.requests(1)[0]
    stopped = tiny.sample(engine, [Request("p0", request.tokens, request.seed, sampling)])["p0"]
    assert stopped.tokens == plain.tokens[: plain.tokens.index(cut) + 1]
    assert stopped.finish_reason == "stop"


def test_a_seed_gives_the_same_bits_alone_and_in_any_batch(engine: Engine) -> None:
    asked = tiny.requests(24, max_tokens=40)
    together = tiny.sample(engine, asked)
    backwards = tiny.sample(engine, asked[::-1])
    alone = {request.key: tiny.sample(engine, [request])[request.key] for request in asked[:6]}
    assert together == backwards
    assert alone == {key: together[key] for key in alone}
    # In the company of requests that are filtered, which decode for longer than some and for less long than others.
    filters = (Sampling(max_tokens=20, temperature=0.0), Sampling(max_tokens=60, top_p=0.5))
    neighbours = [Request(f"n{n}", tiny.prompt_of(n), n, sampling) for n, sampling in enumerate(filters)]
    company = tiny.sample(engine, [*asked[:12], *neighbours])
    assert {key: company[key] for key in alone} == alone
    top_p = {neighbours[1].key: company[neighbours[1].key]}
    assert tiny.sample(engine, neighbours[1:]) == top_p


def test_other_seeds_give_other_tokens(engine: Engine) -> None:
    request = tiny.requests(1, max_tokens=20)[0]
    asked = [Request(f"s{seed}", request.tokens, seed, request.sampling) for seed in (0, 1, 2**62, 2**63 - 1)]
    assert len({done.tokens for done in tiny.sample(engine, asked).values()}) == 4


def test_after_an_update_the_engine_is_the_new_model_and_says_so(engine: Engine, model: nn.Module) -> None:
    new = _other(model)
    asked = tiny.requests(8, max_tokens=20)
    tiny.publish(engine, tiny.state(new), 5)
    done = tiny.sample(engine, asked)
    assert {completion.version for completion in done.values()} == {5}
    assert _worst_gap(new, asked, done) < LOGP_TOLERANCE
    assert _worst_gap(model, asked, done) > 0.1


def test_no_parameter_keeps_its_old_value_through_an_update(engine: Engine, model: nn.Module) -> None:
    """Weights of all NaN, then the true ones: one parameter left behind would make every log-probability NaN."""
    asked = tiny.requests(4)
    before = tiny.sample(engine, asked)
    tiny.publish(engine, [(name, torch.full_like(tensor, float("nan"))) for name, tensor in tiny.state(model)], 1)
    tiny.publish(engine, tiny.state(model), 0)
    assert tiny.sample(engine, asked) == before


def test_buckets_may_come_in_any_order_and_size(engine: Engine, model: nn.Module) -> None:
    new, asked = _other(model), tiny.requests(4)
    results = []
    for version, num_buckets in ((1, 1), (2, 7), (3, 1000)):
        tiny.publish(engine, tiny.state(new)[::-1], version, num_buckets)
        results.append([(done.tokens, done.logp) for _, done in sorted(tiny.sample(engine, asked).items())])
    assert results[0] == results[1] == results[2]


def test_the_checksum_sees_a_swap_and_is_back_with_the_weights(engine: Engine, model: nn.Module) -> None:
    before = engine.checksum()
    assert len(before) == 1
    assert engine.version == 0
    tensors = dict(tiny.state(model))
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][:, [3, 40]] = tensors[name][:, [40, 3]]
    tiny.publish(engine, list(tensors.items()), 1)
    changed = engine.checksum()
    assert {key for key in before[0] if before[0][key] != changed[0][key]} == {name}
    tiny.publish(engine, tiny.state(model), 0)
    assert engine.checksum() == before
    tiny.sample(engine, tiny.requests(1))


def test_other_weights_than_asked_for_are_refused(engine: Engine) -> None:
    with pytest.raises(StaleWeightsError, match=r"expected: version 3\n.*got: version 0"):
        engine.submit(tiny.requests(1), version=3)


def test_the_server_refuses_other_weights_too(engine: Engine) -> None:
    with pytest.raises(EngineError, match="expected: version 3"):
        engine._call("generate", UPDATE_S, requests=[], version=3)


def test_every_bad_tensor_is_named_and_a_whole_update_mends_it(engine: Engine, model: nn.Module) -> None:
    tensors = tiny.state(model)
    name, tensor = tensors[3]
    engine._call("begin", UPDATE_S)
    bad = {
        "unknown tensor model.nonsense": [("model.nonsense", torch.zeros(2))],
        f"tensor {name} has shape": [(name, tensor[:-1])],
        f"of {len(tensors)} tensors never came": None,
    }
    for message, bucket in bad.items():
        with pytest.raises(EngineError, match=message):
            engine._call("load", UPDATE_S, buckets=[None if bucket is None else engine._outbox.pack(bucket)])
    engine._call("load", UPDATE_S, buckets=[engine._outbox.pack([(name, tensor)])])
    with pytest.raises(EngineError, match=f"tensor {name} came twice"):
        engine._call("load", UPDATE_S, buckets=[engine._outbox.pack([(name, tensor)])])
    with pytest.raises(EngineError, match="other weights"):
        engine._call("generate", UPDATE_S, requests=[], version=0)
    engine._call("load", UPDATE_S, buckets=[engine._outbox.pack([entry for entry in tensors if entry[0] != name])])
    engine._call("end", UPDATE_S, version=0)
    tiny.sample(engine, tiny.requests(1))


def test_tensors_outside_of_an_update_are_refused(engine: Engine, model: nn.Module) -> None:
    with pytest.raises(EngineError, match="between begin_weight_update"):
        engine._call("load", UPDATE_S, buckets=[engine._outbox.pack(tiny.state(model))])
    with engine.update(1) as load:
        load(tiny.state(model))
    with pytest.raises(EngineError, match="outside of a weight update"):
        load(tiny.state(model))


def test_a_request_that_cannot_be_served_is_an_error_and_not_an_empty_response(engine: Engine) -> None:
    too_long = Request("long", tuple([5] * 1100), 0, Sampling(max_tokens=4))
    with pytest.raises(EngineError, match="request long failed"):
        tiny.sample(engine, [too_long])
    tiny.sample(engine, tiny.requests(1))


def test_aborted_requests_come_back_as_aborted(engine: Engine) -> None:
    # Many, so that some are still being written when a busy machine gets to the abort.
    asked = [Request(f"a{i}", tiny.prompt_of(i), i, Sampling(max_tokens=500)) for i in range(32)]
    engine.submit(asked, version=0)
    engine.abort()
    done = []
    while engine.in_flight:
        done += engine.poll(0.2)
    assert len(done) == 32
    assert "abort" in {completion.finish_reason for completion in done}


def test_a_pause_of_this_process_and_the_engine_together_is_not_taken_for_silence(engine: Engine) -> None:
    """As when the host is suspended: longer than the limit, and everybody goes on."""
    server = next(report["pid"] for report in engine.info.reports if report["role"] == "server")
    everyone = [os.getpid(), server, *(child.pid for child in psutil.Process(server).children(recursive=True))]
    pids = " ".join(map(str, everyone))
    request = Request("a", tiny.prompt_of(1), 1, Sampling(max_tokens=500))
    subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -STOP {pids}; sleep 5; kill -CONT {pids}"], start_new_session=True)
    start = time.monotonic()
    for _ in range(1000):
        (done,) = engine.generate([request], version=0, quiet_deadline_s=2.5)
        assert len(done.tokens) > 0
        if time.monotonic() - start > 5:
            return
    raise AssertionError("the process was not stopped")


def test_every_process_reports_its_patches(engine: Engine) -> None:
    reports = {report["role"]: report for report in engine.info.reports}
    assert set(reports) == {"server", "scheduler"}
    assert len({report["pid"] for report in reports.values()}) == 2
    assert os.getpid() not in {report["pid"] for report in reports.values()}
    for report in reports.values():
        assert [row["id"] for row in report["patches"] if row["active"]] == [patch.id for patch in PATCHES]
    assert engine.info.is_seeded
