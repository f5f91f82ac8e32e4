"""Every setting, with its default, in one place. Standard library only: importing this costs nothing.

Units stand in the names: `_s` seconds, `_tokens`, `_gib`; `num_` counts, `_coef` multiplies a loss term, `_frac` lies in [0, 1].
A setting in `_s` is a time limit, from 0.001 seconds to 14 days (ranges.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, dataclass_transform

Scalar = bool | int | float | str | None
PresetName = Literal["reinforce_pp", "reinforce_pp_baseline", "prorl_v2", "dapo", "grpo", "dr_grpo", "rloo", "remax", "gspo", "ppo"]
EstimatorName = Literal["reinforce_pp", "reinforce_pp_baseline", "rloo", "remax", "grpo", "dr_grpo", "gae"]
LossName = Literal["ppo_clip", "gspo", "cispo", "reinforce"]
AggregateName = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length"]
RatioLevel = Literal["token", "sequence", "geometric"]
KlName = Literal["k1", "k2", "k3"]
KlLossName = Literal["k1", "k2", "k3", "k1_unbiased", "k2_unbiased", "k3_unbiased"]


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
    deadline_s: float = 900.0  # longest wait for any peer, engine or collective, and longest silence of a rank
    resume: Literal["auto", "never", "must"] = "auto"  # auto: continue when the directory holds a checkpoint
    max_empty_steps: int = 5  # the run stops after so many steps in a row that leave no token to learn from


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
    cp: int = 1  # context parallel: every sequence is cut over cp ranks, two pieces each
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
    num_workers: int = 2  # verifier processes of each engine's leader, at most 1024
    failed_score: float = 0.0  # the score of a response whose verifier failed
    # What truncation does to a score, before any baseline. Truncated is what the engine stopped for its length.
    overlong_frac: float = 0.0  # last share of max_response_tokens over which a penalty grows from 0 to overlong_penalty (DAPO: 0.2)
    overlong_penalty: float = 1.0
    truncated_coef: float | None = None  # the score of a truncated response is multiplied by it (stop properly: 0)
    truncated_score: float | None = None  # or replaced by this


@config
class Rollout:
    dtype: Literal["model", "fp8_block"] = "model"  # fp8_block: E4M3 matrices in blocks of 128 x 128, quantised anew at every update
    tp: int = 1  # GPUs of one engine
    engines: int | None = None  # None: one for every `tp` ranks
    prompts_per_step: int = 64
    samples_per_prompt: int = 4
    max_response_tokens: int = 1024
    # Token ids, or texts of one token, that end a response besides those that the model's files name; in evaluations too.
    stop_tokens: tuple[int | str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    max_concurrent: int = 128  # requests in flight at one engine
    keep_groups: Literal["all", "informative"] = "all"  # informative: prompts whose raw scores differ; others are sampled in their place
    max_refills: int = 3  # roll-outs to make up for dropped prompts in one step; then it trains on what there is
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
    """Credit and loss. Which paper uses what is in config/presets.py."""

    estimator: EstimatorName = "reinforce_pp_baseline"
    gamma: float = 1.0
    gae_lambda: float = 1.0  # of estimator gae
    gae_length_alpha: float | None = None  # lambda = 1 - 1 / (alpha * tokens of the response) in place of gae_lambda (VAPO: 0.05)
    grpo_std: Literal["group", "batch"] = "group"  # whose scores' deviation divides in estimator grpo
    grpo_std_unbiased: bool = True  # n - 1 in it
    grpo_std_eps: float = 1e-6  # added to it
    reward_clip: tuple[float, float] | None = (-10.0, 10.0)  # applied before the baseline
    filter_truncated: bool = False  # truncated responses leave loss and statistics; they stay in their group's mean
    kl_reward_coef: float = 0.0  # beta: subtracted from every token's reward
    kl_reward: KlName = "k1"
    kl_loss_coef: float = 0.0  # lambda: added to the loss
    kl_loss: KlLossName = "k2_unbiased"  # unbiased: its expected gradient is that of KL(new || ref), whatever minibatches is
    kl_target: float | None = None  # nats a token; the coefficient that is not 0 then follows it (Ziegler et al.)
    kl_horizon: int = 10_000  # responses over which it follows
    loss: LossName = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # largest ratio that a negative advantage is multiplied by
    aggregate: AggregateName = "token_mean"
    aggregate_tokens: int | None = None  # of constant_length; None: rollout.max_response_tokens
    minibatches: int = 1  # optimiser steps on one roll-out batch
    entropy_coef: float = 0.0


@config
class Correction:
    """Weights and rejection by the importance ratio w = exp(logp_old - logp_rollout); see algo/correction.py.

    Levels: w of each token, its product over the response, or its geometric mean.
    """

    weight: Literal["none", "token", "sequence", "geometric"] = "none"  # multiplies the policy loss of a token
    weight_clip: tuple[float, float] | None = (0.0, 2.0)  # truncates it (TIS); None leaves it as it is
    weight_normalize: bool = False  # divides it by its mean over the kept tokens of the global batch
    reject: Literal["none", "token", "sequence", "geometric"] = "none"  # drops tokens, or whole responses
    reject_outside: tuple[float, float] | None = None  # what lies outside is rejected; must be set with reject
    reject_mode: Literal["mask", "zero"] = "mask"  # out of the loss mask and its denominator (MIS) | weight 0 (IcePop)
    veto: float | None = None  # a response with a token below this ratio is rejected

    @property
    def is_on(self) -> bool:
        """Whether any part changes a weight or the mask."""
        return self.weight != "none" or self.reject != "none" or self.veto is not None


# Whose paper whitens over the batch. The others' values are left as they are unless stats.normalise says on.
NORMALISED: frozenset[EstimatorName] = frozenset({"reinforce_pp", "reinforce_pp_baseline", "gae"})


@config
class Stats:
    """The normalisation of advantages over the global batch."""

    normalise: Literal["auto", "on", "off"] = "auto"  # auto: as the estimator's paper does
    population: Literal["token", "sample"] = "token"
    scope: Literal["global", "domain"] = "global"  # domain: the prompts of each data.domain_key by themselves
    recentre: bool = True
    wire: Literal["fp64", "fp32", "fp8"] = "fp64"  # how the sums travel between ranks
    limbs: int | None = None  # FP8 numbers that carry one float64; None: enough for 1e-6


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
    microbatch_tokens: int = 8192  # packed tokens of one forward, over all cp ranks; a longer sequence stands alone
    distributed: bool = True  # shard the optimiser state over dp


@config
class Critic:
    """The value model of estimator gae: its own head on the same backbone, on the same devices. Its layout is the policy's."""

    hf: Path | None = None  # backbone; None takes model.hf
    lr: float = 1e-5
    warmup_steps: int = 0  # outer steps in which only the critic learns
    gae_lambda: float | None = None  # of the critic's targets (VC-PPO, VAPO: 1); None: as algo.gae_lambda
    value_clip: float | None = 0.5  # how far a value may move from its old one before the loss is held


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
    preset: PresetName | None = None  # a paper's settings under those written here; see config/presets.py
    run: Run = field(default_factory=Run)
    parallel: Parallel = field(default_factory=Parallel)
    reward: Reward = field(default_factory=Reward)
    rollout: Rollout = field(default_factory=Rollout)
    weights: Weights = field(default_factory=Weights)
    algo: Algo = field(default_factory=Algo)
    correction: Correction = field(default_factory=Correction)
    stats: Stats = field(default_factory=Stats)
    optim: Optim = field(default_factory=Optim)
    critic: Critic = field(default_factory=Critic)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    observe: Observe = field(default_factory=Observe)
    sft: Sft = field(default_factory=Sft)
