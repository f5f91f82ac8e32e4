"""Tiny models, batches and configurations that the Megatron tests share, and the workers' way into a running rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.config.schema import Algo, Config, Data, Model, Optim, Parallel, Run
from megatron_rpp.data.packing import pack_groups
from megatron_rpp.dist.groups import Groups
from megatron_rpp.dist.world import World
from megatron_rpp.types import Group, PackedBatch, Prompt, Response
from tests.mcore.hf import transformers as import_transformers

VOCAB = 200
KINDS = ("llama", "qwen2", "qwen3")
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=16
)


def make_hf(folder: Path, kind: str, *, layers: int = 4) -> Path:
    """Save a random float32 model: llama (llama3 rotary scaling), qwen2 (tied, biases) or qwen3 (query and key norms)."""
    transformers = import_transformers()
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(len(kind))
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=LLAMA3_ROPE))
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=True))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=24))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # away from the ones and zeros of a fresh model, so that a norm or a bias that is not loaded shows
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.06))
    model.save_pretrained(folder)
    return folder


def make_config(
    hf: Path,
    *,
    optim: dict[str, Any] | None = None,
    algo: dict[str, Any] | None = None,
    megatron: dict[str, Any] | None = None,
    **parallel: Any,
) -> Config:
    return Config(
        model=Model(hf=hf, dtype="float32", megatron=megatron or {}),
        data=Data(train=hf),
        run=Run(device="cpu", steps=10, seed=3, deadline_s=120.0),
        parallel=Parallel(**parallel),
        # a large eps keeps Adam from magnifying the rounding of gradients that are next to nothing
        optim=Optim(**{"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "clip_grad": 0.5, "microbatch_tokens": 100, **(optim or {})}),
        algo=Algo(**(algo or {})),
    )


def make_groups(num_prompts: int = 4, samples: int = 3, seed: int = 0) -> tuple[Group, ...]:
    """Prompts and answers of random tokens and very different lengths; one answer has a single token."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())

    groups = []
    for p in range(num_prompts):
        prompt = Prompt(uid=f"p{p}", tokens=tokens(1, 9), text="", answer="")
        responses = []
        for s in range(samples):
            answer = tokens(1, 2) if (p, s) == (0, 0) else tokens(2, 30)
            logp = tuple((-4.0 - torch.rand(len(answer), generator=generator)).tolist())
            responses.append(Response(prompt.uid, s, answer, logp, "", "stop", version=0, score=float(s)))
        groups.append(Group(prompt, tuple(responses)))
    return tuple(groups)


def make_batch(groups: tuple[Group, ...], dp_rank: int = 0, dp_size: int = 1, *, num_minibatches: int = 1) -> tuple[PackedBatch, Tensor]:
    """This dp rank's batch with made-up old log-probabilities, and advantages that depend on token and place alone."""
    batch = pack_groups(groups, dp_rank, dp_size, num_minibatches=num_minibatches)
    batch = batch.with_logp(old=batch.logp_rollout_T, ref=None)
    place_T = torch.cat([torch.arange(n) for n in torch.diff(batch.cu_len_S1).tolist()] + [torch.zeros(0, dtype=torch.int64)])
    adv_T = torch.sin(batch.tokens_T * 0.7 + place_T * 0.31).to(torch.float32) * batch.mask_T
    return batch, adv_T


def surrogate(logp_new_T: Tensor, entropy_T: Tensor, batch: PackedBatch, adv_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """An objective with everything the real one has: ratio, mask, entropy. Small enough to check by eye."""
    ratio_T = torch.where(batch.mask_T, (logp_new_T - batch.logp_old_T).clamp(-2, 2).exp(), 0.0)
    policy, entropy = -(ratio_T * adv_T).sum(), (entropy_T * batch.mask_T).sum()
    return policy - 0.05 * entropy, batch.mask_T.sum(), {"policy_loss": policy, "entropy": entropy}


@contextlib.contextmanager
def megatron(cfg: Config) -> Iterator[Groups]:
    """A Megatron rank inside `run_ranks(..., init=False)`."""
    from megatron_rpp.mcore.init import start, stop

    groups = start(cfg, World.from_env())
    try:
        yield groups
    finally:
        stop()


def open_policy(cfg: Config, groups: Groups, **keywords: Any):
    """A policy with the weights of its directory, and its live weights for reading it back."""
    from megatron_rpp.mcore.policy import Policy
    from megatron_rpp.weights.load import fill

    policy = Policy.from_config(cfg, groups, **keywords)
    live, checkpoint = live_view(policy, cfg)
    fill(live, checkpoint)
    policy.weights_changed()
    return policy


def live_view(policy, cfg: Config):
    from megatron_rpp.weights.families.registry import describe
    from megatron_rpp.weights.hf_io import open_hf
    from megatron_rpp.weights.live import live_weights

    checkpoint = open_hf(cfg.model.hf)
    return live_weights(describe(checkpoint.config), policy.named_local(), policy.groups, dtype=policy.dtype, deadline_s=120.0), checkpoint


def weights_as_hf(policy, cfg: Config, *, of: str = "weights") -> dict[str, Tensor]:
    """Whole tensors under Hugging Face names on rank 0, empty elsewhere: the weights, or the finished gradients."""
    from megatron_rpp.weights.gather import iter_hf_tensors

    live, _ = live_view(policy, cfg)
    if of == "gradients":
        # the biases of a router are buffers, which no gradient reaches
        grads = {name: getattr(tensor, "main_grad", torch.zeros_like(tensor)) for name, tensor in live.tensors.items()}
        live = replace(live, tensors=grads)
    found: dict[str, Tensor] = {}
    for bucket in iter_hf_tensors(live, (0,), deadline_s=60.0):
        found.update({name: tensor.clone() for name, tensor in bucket.items()})
    return found
