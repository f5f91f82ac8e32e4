"""The quickstart's assets and the GSM8K example: what a first run of the project stands on."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_rpp.config.load import load
from megatron_rpp.data.prompts import load_prompts
from megatron_rpp.data.template import encode, load_tokenizer
from megatron_rpp.reward import arithmetic
from megatron_rpp.reward.base import RewardInput
from megatron_rpp.weights.families.registry import describe

EXAMPLES = Path(__file__).parents[3] / "examples"


def make(out: Path, seed: int) -> Path:
    """In this process, which has paid for torch and transformers; tests/e2e runs it as the command that it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "quickstart"))
        importlib.import_module("make_assets").make_assets(out, seed)
    return out


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("assets"), 0)


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


def test_held_out_problems_are_in_no_training_file_and_none_repeats(assets: Path) -> None:
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


def test_the_two_ways_to_answer_part_at_their_first_token_and_steps_are_single_tokens(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "model")
    worked = tokenizer.tokenize("Steps: 7+5=12, 12-3=9. Answer: 9")
    assert worked == ["Steps: ", *"7+5=12", ", ", *"12-3=9", ". ", "Answer: ", "9"]
    assert tokenizer.tokenize("Answer: 9") == ["Answer: ", "9"]


def test_the_tokenizer_reads_and_writes_any_text(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "model")
    text = 'Jan\u00e9 paid \u00a35, or \U0001f600. Steps: \\frac{1}{2}\n\n"Answer: " \x00'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = encode(tokenizer, "7+5=", template="chat", system="be brief")
    assert tokenizer.decode(tokens) == "<|system|>be brief<|user|>7+5=<|assistant|>"
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == "be brief7+5="


def test_the_checkpoint_holds_exactly_the_tensors_of_its_architecture(assets: Path) -> None:
    config = json.loads((assets / "model" / "config.json").read_text())
    with safe_open(assets / "model" / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    expected = dict(describe(config).hf_shapes)
    expected.pop("lm_head.weight", None)  # tied
    assert shapes == expected
    assert config["vocab_size"] >= len(load_tokenizer(assets / "model"))


def test_the_gsm8k_sample_loads_through_the_tiny_settings(assets: Path) -> None:
    cfg = load(EXAMPLES / "gsm8k" / "tiny.yaml")
    prompts = load_prompts(cfg.data, load_tokenizer(assets / "model")).prompts
    assert [prompt.answer for prompt in prompts] == ["19", "1,400", "11", "200", "63", "270", "30", "-5"]
    assert len(prompts) >= cfg.rollout.prompts_per_step
