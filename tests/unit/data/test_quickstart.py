"""The quickstart's assets and the GSM8K example: what a first run of the project stands on."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_rpp.config.load import load
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.prompts import load_prompts
from megatron_rpp.data.template import load_tokenizer
from megatron_rpp.reward import arithmetic
from megatron_rpp.reward.base import RewardInput
from megatron_rpp.weights.families.registry import describe

EXAMPLES = Path(__file__).parents[3] / "examples"
DIGESTS = {"train": "81da669b9cea6a9a", "eval": "139eec893a80947b", "sft": "6a87ec2685215052"}


def make(out: Path, seed: int, *, hard: bool = False) -> Path:
    """In this process, which has paid for torch and transformers; tests/e2e runs it as the command that it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "quickstart"))
        importlib.import_module("make_assets").make_assets(out, seed, hard=hard)
    return out


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("assets"), 0)


@pytest.fixture(scope="module")
def hard_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hard"), 0, hard=True)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(response: str, answer: object) -> float:
    return arithmetic.score(RewardInput("", response, str(answer)))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(assets: Path, tmp_path: Path) -> None:
    again, other = make(tmp_path / "again", 0), make(tmp_path / "other", 1)
    for name in ("sft.jsonl", "train.jsonl", "eval.jsonl", "model/model.safetensors", "model/tokenizer.json", "model/config.json"):
        assert (assets / name).read_bytes() == (again / name).read_bytes(), name
    for name in ("sft.jsonl", "train.jsonl", "eval.jsonl", "model/model.safetensors"):
        assert (assets / name).read_bytes() != (other / name).read_bytes(), name


def test_seed_zero_makes_the_problems_it_always_made(assets: Path) -> None:
    """docs/experiments.md and the README quote runs on them."""
    digests = {name: hashlib.sha256((assets / f"{name}.jsonl").read_bytes()).hexdigest()[:16] for name in ("train", "eval", "sft")}
    assert digests == DIGESTS


@pytest.mark.parametrize("kind", ["assets", "hard_assets"])
def test_held_out_problems_are_in_no_training_file_and_none_repeats(kind: str, request: pytest.FixtureRequest) -> None:
    assets = request.getfixturevalue(kind)
    prompts = {name: [row["prompt"] for row in read(assets / f"{name}.jsonl")] for name in ("sft", "train", "eval")}
    everything = [prompt for rows in prompts.values() for prompt in rows]
    assert len(set(everything)) == len(everything)
    assert len(prompts["eval"]) >= 500


def test_answers_are_what_the_chains_come_to(assets: Path) -> None:
    for row in [*read(assets / "train.jsonl"), *read(assets / "eval.jsonl")]:
        first, *rest = re.findall(r"[+-]?\d+", row["prompt"])
        assert int(row["answer"]) == int(first) + sum(map(int, rest))


def test_the_warm_up_corpus_is_right_throughout_and_mostly_bare(assets: Path) -> None:
    rows = read(assets / "sft.jsonl")
    worked = [row for row in rows if row["response"].startswith("Steps: ")]
    bare = [row for row in rows if row["response"].startswith("Answer: ")]
    assert len(worked) + len(bare) == len(rows)
    assert 0.37 < len(worked) / len(rows) < 0.43
    for row in rows:
        assert score(row["response"], sum(map(int, re.findall(r"[+-]?\d+", row["prompt"])))) == 1.0
    for row in worked:
        steps = re.findall(r"(\d+)([+-]\d+)=(\d+)", row["response"])
        assert len(steps) == len(re.findall(r"\d", row["prompt"])) - 1
        assert all(int(left) + int(term) == int(result) for left, term, result in steps)


def codec_of(model: Path, example: str = "quickstart/run.yaml") -> Codec:
    cfg = load(EXAMPLES / example)
    return Codec.open(replace(cfg, model=replace(cfg.model, hf=model)))


def test_the_two_ways_to_answer_part_at_their_first_token_and_steps_are_single_tokens(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "model")
    worked = tokenizer.tokenize("Steps: 7+5=12, 12-3=9. Answer: 9")
    assert worked == ["Steps: ", *"7+5=12", ", ", *"12-3=9", ". ", "Answer: ", "9"]
    assert tokenizer.tokenize("Answer: 9") == ["Answer: ", "9"]


def test_the_tokenizer_reads_and_writes_any_text(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "model")
    text = 'Jan\u00e9 paid \u00a35, or \U0001f600. Steps: \\frac{1}{2}\n\n"Answer: " \x00'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    codec = codec_of(assets / "model")
    tokens = replace(codec, system="be brief").encode_prompt("7+5=").tokens
    assert tokenizer.decode(tokens) == "<|system|>be brief<|user|>7+5=<|assistant|>"
    assert codec.stop.ids == (tokenizer.eos_token_id,)
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == "be brief7+5="


def test_the_checkpoint_holds_exactly_the_tensors_of_its_architecture(assets: Path) -> None:
    config = json.loads((assets / "model" / "config.json").read_text())
    with safe_open(assets / "model" / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    expected = dict(describe(config).hf_shapes)
    expected.pop("lm_head.weight", None)  # tied
    assert shapes == expected
    assert config["vocab_size"] >= len(load_tokenizer(assets / "model"))


def steps_of(response: str) -> list[tuple[int, str, int, int]]:
    return [(int(left), sign, int(term), int(result)) for left, sign, term, result in re.findall(r"(\d)([+-])(\d)=(\d)", response)]


def test_hard_problems_and_bare_answers_are_right_modulo_ten(hard_assets: Path) -> None:
    rows = [*read(hard_assets / "train.jsonl"), *read(hard_assets / "eval.jsonl")]
    bare = [
        row | {"answer": row["response"].removeprefix("Answer: ")}
        for row in read(hard_assets / "sft.jsonl")
        if "Steps" not in row["response"]
    ]
    assert bare
    for row in [*rows, *bare]:
        assert int(row["answer"]) == sum(map(int, re.findall(r"[+-]?\d+", row["prompt"]))) % 10


def test_hard_worked_solutions_follow_the_problem_and_go_on_from_what_they_wrote(hard_assets: Path) -> None:
    for row in read(hard_assets / "sft.jsonl"):
        if not row["response"].startswith("Steps: "):
            continue
        steps, total = steps_of(row["response"]), int(row["prompt"][0])
        assert [(sign, term) for _, sign, term, _ in steps] == [
            (sign, int(term)) for sign, term in re.findall(r"([+-])(\d)", row["prompt"])
        ]
        for left, _, _, result in steps:
            assert left == total
            total = result
        assert row["response"].endswith(f". Answer: {total}")


def test_each_slip_of_the_hard_corpus_has_one_wrong_result_and_a_rate_of_its_own(hard_assets: Path) -> None:
    results: dict[tuple[int, str, int], Counter[int]] = defaultdict(Counter)
    for row in read(hard_assets / "sft.jsonl"):
        for left, sign, term, result in steps_of(row["response"]):
            results[left, sign, term][result] += 1
    assert len(results) == 100
    rates = []
    for (left, sign, term), written in results.items():
        right = (left + term if sign == "+" else left - term) % 10
        assert len(written.keys() - {right}) <= 1
        rates.append(1 - written[right] / written.total())
    slips = sorted(rate for rate in rates if rate)
    assert len(slips) == 50
    evenly = [0.3 + 0.6 * number / 49 for number in range(50)]
    assert max(abs(rate - expected) for rate, expected in zip(slips, evenly, strict=True)) < 0.08


def test_hard_problems_and_their_solutions_fit_the_run_files_limits(hard_assets: Path) -> None:
    cfg, codec = load(EXAMPLES / "quickstart" / "run.yaml"), codec_of(hard_assets / "model")
    for row in read(hard_assets / "sft.jsonl")[:500]:
        assert len(codec.encode_prompt(row["prompt"]).tokens) <= cfg.data.max_prompt_tokens
        assert len(codec.encode_response(row["response"])) <= cfg.rollout.max_response_tokens


def test_the_gsm8k_sample_loads_through_the_tiny_settings(assets: Path) -> None:
    cfg = load(EXAMPLES / "gsm8k" / "tiny.yaml")
    prompts = load_prompts(cfg.data, codec_of(assets / "model", "gsm8k/tiny.yaml")).prompts
    assert [prompt.answer for prompt in prompts] == ["19", "1,400", "11", "200", "63", "270", "30", "-5"]
    assert len(prompts) >= cfg.rollout.prompts_per_step
