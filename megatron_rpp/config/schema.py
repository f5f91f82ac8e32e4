"""Every setting, with its default, in one place. Standard library only: importing this costs nothing.

Units stand in the names: `_s` seconds, `_tokens`, `_gib`; `num_` counts, `_coef` multiplies a loss term, `_frac` lies in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, dataclass_transform

Scalar = bool | int | float | str | None
EstimatorName = Literal["reinforce_pp", "reinforce_pp_baseline"]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type) -> type:
    """A frozen section whose unknown keys are errors."""
    cls.__pydantic_config__ = {"extra": "forbid"}
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@config
class Run:
    dir: Path = Path("runs/default")  # everything that the run writes, and all it needs to continue
    seed: int = 0
    steps: int = 100  # outer steps: one roll-out and its updates
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deadline_s: float = 900.0  # longest wait for any peer, engine or collective
    resume: Literal["auto", "never", "must"] = "auto"  # auto: continue when the directory holds a checkpoint


@config
class Model:
    hf: Path  # HF directory: config.json, safetensors, tokenizer
    ref: Path | None = None  # the frozen reference; None takes `hf`
    megatron_checkpoint: Path | None = None  # a torch_dist checkpoint to take the weights from; None takes those of `hf`
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    megatron: dict[str, Scalar] = field(default_factory=dict)  # any TransformerConfig field


@config
class Parallel:
    tp: int = 1
    pp: int = 1
    vpp: int = 1  # virtual pipeline chunks a stage
    cp: int = 1
    dp: int = 1
    ep: int = 1  # expert parallel: the experts of a layer are spread over ep of a stage's tp x cp x dp ranks
    etp: int = 1  # expert tensor parallel: each expert is cut over etp ranks, whatever tp is
    sp: bool = True  # sequence parallel wherever tp > 1


@config
class Data:
    train: Path  # .jsonl or .parquet
    eval: Path | None = None
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    answer_after: str | None = None  # keep what follows the last such marker of the answer, e.g. "####" for GSM8K
    domain_key: str | None = None
    template: Literal["chat", "none"] = "chat"  # none: the text itself is tokenised
    system: str | None = None  # system message put before every prompt
    max_prompt_tokens: int = 1024
    on_bad_row: Literal["error", "skip"] = "error"


@config
class Reward:
    name: str = "math"  # exact | arithmetic | math | package.module:function
    timeout_s: float = 10.0  # wall clock of one verifier call, then its worker is killed
    num_workers: int = 2
    failed_score: float = 0.0  # the score of a response whose verifier failed


@config
class Rollout:
    dtype: Literal["model", "fp8_block"] = "model"  # fp8_block: E4M3 matrices in blocks of 128 x 128, quantised anew at every update
    tp: int = 1  # GPUs of one engine
    engines: int | None = None  # None: one for every `tp` ranks
    prompts_per_step: int = 64
    samples_per_prompt: int = 4
    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    max_concurrent: int = 128  # requests in flight at one engine
    start_deadline_s: float = 600.0
    deadline_s: float = 7200.0  # all responses of one step; an engine silent for run.deadline_s is given up before
    sglang: dict[str, Scalar] = field(default_factory=dict)  # any ServerArgs field


@config
class Weights:
    """How the policy's weights reach the engines."""

    path: Literal["direct", "gather"] = "direct"  # direct: shard to shard; gather: whole HF tensors to every leader, any model
    bucket_mib: int = 512  # at most what a rank sends, or receives, at a time


@config
class Algo:
    estimator: EstimatorName = "reinforce_pp_baseline"
    gamma: float = 1.0
    kl_reward_coef: float = 0.0  # beta: k1 to the reference, subtracted from every token's reward
    kl_loss_coef: float = 0.0  # lambda: k2 to the reference, added to the loss
    clip_low: float = 0.2
    clip_high: float = 0.2
    reward_clip: tuple[float, float] | None = (-10.0, 10.0)  # applied before the baseline
    norm_population: Literal["token", "sample"] = "token"
    norm_recentre: bool = True
    minibatches: int = 1  # optimiser steps on one roll-out batch
    entropy_coef: float = 0.0


@config
class Optim:
    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0  # optimiser steps
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_grad: float = 1.0
    microbatch_tokens: int = 8192  # packed tokens of one forward; a longer sequence stands alone
    distributed: bool = True  # shard the optimiser state over dp


@config
class Checkpoint:
    every: int = 0  # steps; 0 saves only at the end
    keep: int = 2


@config
class Eval:
    every: int = 0  # steps; 0 evaluates before and after only, and only when data.eval is set
    max_prompts: int | None = None
    temperature: float = 0.0
    max_response_tokens: int | None = None  # None: rollout.max_response_tokens


@config
class Observe:
    tensorboard: bool = True
    console: Literal["auto", "rich", "plain", "off"] = "auto"
    # mean |logp_old - logp_rollout| above which the run says so; None: 1e-3 in float32, 0.1 in bfloat16, more with rollout.dtype fp8_block
    mismatch_alarm: float | None = None
    mismatch_action: Literal["warn", "stop"] = "warn"


@config
class Sft:
    """Settings of `rpp sft`, the supervised warm-up."""

    train: Path | None = None  # .jsonl rows with the prompt key and `response`
    out: Path | None = None  # the HF directory it writes
    steps: int = 0
    batch_sequences: int = 64
    lr: float = 1e-3
    warmup_steps: int = 20


@config
class Config:
    model: Model
    data: Data
    run: Run = field(default_factory=Run)
    parallel: Parallel = field(default_factory=Parallel)
    reward: Reward = field(default_factory=Reward)
    rollout: Rollout = field(default_factory=Rollout)
    weights: Weights = field(default_factory=Weights)
    algo: Algo = field(default_factory=Algo)
    optim: Optim = field(default_factory=Optim)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    observe: Observe = field(default_factory=Observe)
    sft: Sft = field(default_factory=Sft)
