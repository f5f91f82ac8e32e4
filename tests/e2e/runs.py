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


def make_moe(assets: Path, folder: Path) -> Path:
    """The quickstart's model with four experts in every layer and random weights, as an HF directory."""
    shutil.copytree(assets / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": 64, "norm_topk_prob": True, "tie_word_embeddings": False}
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


def checkpoint_digest(run_dir: Path, step: int, scratch: Path) -> dict[str, str]:
    """Name -> digest of every tensor in a checkpoint: weights, optimiser state; whatever files they lie in."""
    merged = scratch / f"{run_dir.name}-{step}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step-{step:06d}" / "policy", merged)
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
