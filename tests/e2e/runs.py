"""Whole runs of `rpp`, started as a user starts them, on a tiny model whose reward a random policy can already move."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_rpp.weights.families.registry import describe

ROOT = Path(__file__).parents[2]
LIMIT_S = 400
YAML = """\
model: {{hf: {assets}/model, dtype: float32}}
data: {{train: {assets}/train.jsonl, eval: {assets}/eval.jsonl, max_prompt_tokens: 32}}
reward: {{name: "tests.e2e.rewards:digits", num_workers: 1}}
parallel: {{tp: 2}}
rollout: {{engines: 1, prompts_per_step: 8, samples_per_prompt: 4, max_response_tokens: 12}}
algo: {{kl_loss_coef: 1.0e-3, minibatches: 2}}
optim: {{lr: 3.0e-4}}
eval: {{every: 2, max_prompts: 16}}
checkpoint: {{every: 3, keep: 3}}
observe: {{tensorboard: false, console: plain}}
run: {{steps: 6}}
"""
# All state that a run can have: a critic and its optimizer, a KL coefficient that moves, a cursor that refills have moved. Of the
# problems, every one with an odd answer is refilled.
STATEFUL = ("preset=ppo", "critic.lr=1e-3", "critic.warmup_steps=1", "algo.kl_loss_coef=0", "algo.kl_target=0.1", "algo.kl_horizon=32")
STATEFUL += ("reward.name=tests.e2e.rewards:digits_of_even_problems", "rollout.keep_groups=informative", "rollout.prompts_per_step=4")
STATEFUL += ("eval.every=3", "checkpoint.keep=9")


@dataclass(frozen=True)
class Finished:
    """A run that has ended. output: everything that it printed on this terminal."""

    dir: Path
    code: int
    output: str

    @property
    def metrics(self) -> bytes:
        return (self.dir / "metrics.jsonl").read_bytes()

    def records(self, kind: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.metrics.splitlines()]
        return [record for record in found if record["kind"] == kind]

    def column(self, name: str) -> list[float]:
        return [record[name] for record in self.records("step")]


def environment() -> dict[str, str]:
    """Importable from the tests, and free of whatever launched pytest."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rpp(*words: str, module: str = "megatron_rpp") -> tuple[int, str]:
    """Run one command to its end; its exit code and what it printed."""
    line = [sys.executable, "-m", module, *words]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return done.returncode, done.stdout + done.stderr


def train(yaml: Path, run_dir: Path, *overrides: str) -> Finished:
    code, output = rpp("train", str(yaml), f"run.dir={run_dir}", *overrides)
    return Finished(run_dir, code, output)


@contextlib.contextmanager
def training(yaml: Path, run_dir: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run under way; whatever is left of it ends with the block."""
    words = [sys.executable, "-m", "megatron_rpp", "train", str(yaml), f"run.dir={run_dir}", *overrides]
    with open(run_dir.with_suffix(".out"), "w") as out:
        process = subprocess.Popen(words, env=environment(), stdout=out, stderr=out, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def await_record(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has recorded a step."""
    wanted = re.compile(rb'"kind": "step", "step": %d,' % step)
    limit = time.monotonic() + LIMIT_S
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and wanted.search(metrics.read_bytes())):
        assert process.poll() is None, f"the run ended before step {step}: {run_dir.with_suffix('.out').read_text()}"
        assert time.monotonic() < limit, f"no step {step} after {LIMIT_S} s"
        time.sleep(0.02)


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the run has written a file."""
    limit = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None, f"the run ended before it wrote {path}"
        assert time.monotonic() < limit, f"no {path} after {LIMIT_S} s"
        time.sleep(0.02)


def make_deepseek(assets: Path, folder: Path) -> Path:
    """The quickstart's model as a DeepSeek-V3 with random weights: latent attention with yarn, a dense layer, experts in groups."""
    latent = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 256}
    changes = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        **latent,
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "rope_parameters": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32},
        **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    }
    return _remake(assets, folder, changes)


def make_llama(assets: Path, folder: Path) -> Path:
    """The quickstart's model as a Llama with random weights."""
    return _remake(assets, folder, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def make_of_whole_blocks(assets: Path, folder: Path) -> Path:
    """The quickstart's model with random weights, in sizes that block FP8 takes; two trainer ranks cut its heads inside a block."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return _remake(assets, folder, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **sizes})


def _remake(assets: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(assets / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text()) | changes | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in describe(config).hf_shapes.items()}
    tensors |= {name: tensor + 1 for name, tensor in tensors.items() if "norm" in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of living processes that name the run directory, or have a file in it or its output open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            open_files = b" ".join(os.readlink(bytes(link)) for link in (folder / "fd").iterdir())
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z" and int(folder.name) != os.getpid() and str(run_dir).encode() in line + open_files:
            found.append(line.replace(b"\0", b" ").decode()[:200])
    return found


def ledger(run_dir: Path) -> dict[str, int]:
    """Name of each roll-out -> when its last response was written, in nanoseconds."""
    return {path.name.removesuffix(".leader-0.jsonl"): path.stat().st_mtime_ns for path in run_dir.glob("ledger/*/*.jsonl")}


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def checkpoint_digest(run_dir: Path, step: int, scratch: Path, *, of: str = "policy") -> dict[str, str]:
    """Name -> digest of every tensor in a checkpoint: weights, optimiser state; whatever files they lie in."""
    merged = scratch / f"{run_dir.name}-{step}-{of}.pt"
    dcp_to_torch_save(checkpoint(run_dir, step) / of, merged)
    digests: dict[str, str] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)
        elif isinstance(value, torch.Tensor):
            digests[name] = hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    walk("", torch.load(merged, weights_only=False))
    assert len(digests) > 20, digests
    return digests
