"""What ends a response, and inputs that end a run before anything heavy has started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e import runs

ONE_STEP = ("parallel.tp=1", "run.steps=1", "checkpoint.every=0", "eval.every=1")
BYTES = list(range(5, 261))  # all that a random policy writes but for a few words


def copy_model(assets: Path, folder: Path, **config: object) -> Path:
    """The model with other entries in config.json."""
    shutil.copytree(assets / "model", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_stop_tokens_of_the_setting_end_responses_in_training_and_evaluation(
    yaml: Path, uninterrupted: runs.Finished, tmp_path: Path
) -> None:
    run = runs.train(yaml, tmp_path / "run", *ONE_STEP, f"rollout.stop_tokens={BYTES}")
    assert run.code == 0, run.output
    assert run.column("response/tokens_mean")[0] < 2 < uninterrupted.column("response/tokens_mean")[0]
    truncated, before = ([record["eval/truncated_frac"] for record in one.records("eval")] for one in (run, uninterrupted))
    assert max(truncated) < 0.5 < before[0]
    assert "ran into the length limit" not in run.output
    warnings = [line for line in uninterrupted.output.splitlines() if "ran into the length limit (rollout.max_response_tokens)" in line]
    assert [line.partition(": ")[2].rpartition(": 100%")[0] for line in warnings] == ["evaluation at step 0", "step 1"], warnings
    assert "stop tokens: 1 '<|end|>' (tokenizer_config.json, generation_config.json, config.json)" in uninterrupted.output


def test_the_end_token_of_the_tokenizer_ends_responses_whatever_config_json_says(yaml: Path, assets: Path, tmp_path: Path) -> None:
    """The engine by itself stops at the end tokens of config.json and generation_config.json only, and here there are none."""
    model = copy_model(assets, tmp_path / "model", eos_token_id=None)
    (model / "generation_config.json").unlink()
    path = model / "tokenizer_config.json"
    tokenizer = AutoTokenizer.from_pretrained(model)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": tokenizer.convert_ids_to_tokens(200)}))
    words = (f"model.hf={model}", "rollout.max_response_tokens=24", "eval.max_prompts=128", "eval.temperature=1.0")
    words += ("reward.name=tests.e2e.rewards:sees_the_assistants_turn",)
    code, output = runs.rpp("eval", str(yaml), f"run.dir={tmp_path / 'run'}", *ONE_STEP, *words)
    assert code == 0, output
    assert f"stop tokens: 200 {tokenizer.decode([200])!r} (tokenizer_config.json)\n" in output
    rows = [json.loads(line) for line in (tmp_path / "run" / "rpp-eval" / "eval" / "model.jsonl").read_text().splitlines()]
    assert any(row["num_tokens"] < 24 for row in rows)
    assert [row["score"] for row in rows] == [1.0] * 128


def _prompt_beyond_the_model(assets: Path, folder: Path) -> tuple[str, ...]:
    model = copy_model(assets, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<new{n}>" for n in range(60)])
    tokenizer.save_pretrained(model)
    path = folder / "train.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+1=<new59>", "answer": "2"}\n')
    return f"model.hf={model}", f"data.train={path}", "rollout.prompts_per_step=2"


INPUTS = {
    "too few prompts": (
        lambda assets, folder: ("rollout.prompts_per_step=5000",),
        "train.jsonl: there are fewer prompts than one step takes",
    ),
    "a token without a row": (_prompt_beyond_the_model, "train.jsonl:2: prompt token 324 ('<new59>', at position 5) is not in the model"),
    "no end token": (
        lambda assets, folder: (f"model.hf={_without_end(copy_model(assets, folder / 'model', eos_token_id=None))}",),
        "no token ends a response",
    ),
    "a stop token of two": (lambda assets, folder: ("rollout.stop_tokens=[ab]",), "'ab' is not a single token of this tokenizer"),
}


def _without_end(model: Path) -> Path:
    (model / "generation_config.json").unlink()
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    return model


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_cannot_be_used_end_a_run_before_an_engine_starts(kind: str, yaml: Path, assets: Path, tmp_path: Path) -> None:
    words, message = INPUTS[kind]
    run = runs.train(yaml, tmp_path / "run", *ONE_STEP, *words(assets, tmp_path))
    assert run.code in (1, 2), run.output
    assert message in run.output
    assert run.output.count("rpp train: ") == 1
    assert "Traceback" not in run.output
    assert not list((run.dir / "logs").glob("engine-*.log"))


def test_llama_loads_its_tokenizer_beside_a_cpu_build_of_torch(yaml: Path, assets: Path, tmp_path: Path) -> None:
    """transformers imports torchvision with Llama's classes, and torchvision's C++ part needs CUDA."""
    model = runs.make_llama(assets, tmp_path / "model")
    run = runs.train(yaml, tmp_path / "run", *ONE_STEP, f"model.hf={model}", "eval.every=0")
    assert run.code == 0, run.output
    assert max(run.column("mismatch/max_abs")) <= 1e-4


def test_ranks_that_read_different_prompts_stop_together(yaml: Path, assets: Path, tmp_path: Path) -> None:
    """Hosts may hold different files under one name; here the name depends on the rank."""
    torchrun = ("--nproc-per-node=2", "--standalone", "-m", "tests.e2e.another_file_on_rank_1")
    words = ("train", str(yaml), f"run.dir={tmp_path / 'run'}", "run.steps=1")
    code, output = runs.rpp(*torchrun, *words, module="torch.distributed.run")
    assert code == 1, output
    assert "the ranks read different prompts from this file" in output
    assert "another one on ranks 1" in output
    assert not list((tmp_path / "run" / "logs").glob("engine-*.log"))


def test_a_warm_up_on_a_token_without_a_row_is_refused_with_its_line(yaml: Path, assets: Path, tmp_path: Path) -> None:
    """The embedding of a token beyond the model is foreign memory: the first gradients were 60 times too large."""
    model = copy_model(assets, tmp_path / "model", vocab_size=262)
    words = (f"model.hf={model}", f"sft.train={assets / 'sft.jsonl'}", f"sft.out={tmp_path / 'out'}", "sft.steps=2", "sft.warmup_steps=0")
    code, output = runs.rpp("sft", str(yaml), f"run.dir={tmp_path / 'run'}", "parallel.tp=1", "rollout.max_response_tokens=64", *words)
    assert code == 1, output
    assert "sft.jsonl:1: response token 26" in output
    assert "which has 262 rows" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
