"""A tiny random Qwen3 with a tokenizer of its own, the oracle for its log-probabilities, and ways to ask an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.request import Completion, Request, Sampling
from megatron_rpp.rollout.seeds import request_seed
from tests.mcore.hf import transformers

VOCAB = 160
END = 1
LAYERS = 3
QUIET_S = 60.0


def make_hf(folder: Path, *, seed: int = 0, layers: int = LAYERS, hidden: int = 64) -> Path:
    """Save a random float32 model in which no parameter has a value that a forgotten load would leave behind."""
    torch.manual_seed(seed)
    config = transformers().Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = transformers().Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1))
    model.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> nn.Module:
    return transformers().Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logp_of(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probabilities of `tokens` after `prompt`, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].double() / temperature
    logp = torch.log_softmax(logits, dim=-1)
    return [logp[len(prompt) + i - 1, token].item() for i, token in enumerate(tokens)]


def prompt_of(index: int, length: int = 8) -> tuple[int, ...]:
    return tuple(torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(index)).tolist())


def requests(num: int, *, step: int = 0, max_tokens: int = 12, temperature: float = 1.0, top_p: float = 1.0) -> list[Request]:
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    return [Request(f"p{i}", prompt_of(i, 4 + i % 9), request_seed(7, step, f"p{i}", 0), sampling) for i in range(num)]


def sample(engine: Engine, asked: Sequence[Request], version: int | None = None) -> dict[str, Completion]:
    """All completions by key."""
    version = engine.version if version is None else version
    return {done.key: done for done in engine.generate(asked, version=version, quiet_deadline_s=QUIET_S)}


def state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]


def publish(engine: Engine, tensors: Sequence[tuple[str, Tensor]], version: int, num_buckets: int = 3) -> None:
    """A whole update, in buckets."""
    with engine.update(version) as load:
        for bucket in range(num_buckets):
            load(tensors[bucket::num_buckets])
