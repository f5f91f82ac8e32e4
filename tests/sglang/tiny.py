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
PADDED_VOCAB = 192  # SGLang pads to a multiple of 64
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


def shards(model: nn.Module, rank: int, tp: int) -> dict[str, Tensor]:
    """What SGLang's parameters hold on one rank, cut by hand: query, key and value in one matrix, gate and up in one."""
    whole = dict(state(model))

    def rows(name: str) -> Tensor:
        return whole[name].chunk(tp)[rank]

    # The padded vocabulary is cut in equal parts, so the last rank has fewer true rows.
    first, height = rank * PADDED_VOCAB // tp, PADDED_VOCAB // tp
    found = {name: whole[name][first : first + height] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    found["model.norm.weight"] = whole["model.norm.weight"]
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        found[f"{at}.self_attn.qkv_proj.weight"] = torch.cat([rows(f"{at}.self_attn.{part}_proj.weight") for part in "qkv"])
        found[f"{at}.mlp.gate_up_proj.weight"] = torch.cat([rows(f"{at}.mlp.{part}_proj.weight") for part in ("gate", "up")])
        for name in (f"{at}.self_attn.o_proj.weight", f"{at}.mlp.down_proj.weight"):
            found[name] = whole[name].chunk(tp, dim=1)[rank]
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        found |= {f"{at}.{norm}.weight": whole[f"{at}.{norm}.weight"] for norm in norms}
    return found


def announce(parameters: dict[str, Tensor], tp: int) -> dict[str, tuple[list[int], int]]:
    """Of a rank's parameters: their shapes in SGLang, and how many elements come."""

    def shape(name: str, tensor: Tensor) -> list[int]:
        return [PADDED_VOCAB // tp, tensor.shape[1]] if "embed" in name or "lm_head" in name else list(tensor.shape)

    return {name: (shape(name, tensor), tensor.numel()) for name, tensor in parameters.items()}


def rectangles(name: str, tensor: Tensor) -> list[tuple[list[object], Tensor]]:
    """A parameter in four rectangles of different sizes, or a vector in two."""
    matrix = tensor if tensor.dim() == 2 else tensor[:, None]
    row, col = matrix.shape[0] // 3, matrix.shape[1] // 2
    corners = [(slice(0, row), slice(0, col)), (slice(0, row), slice(col, None))]
    corners += [(slice(row, None), slice(0, col)), (slice(row, None), slice(col, None))]
    return [([name, [], r.start, c.start], matrix[r, c]) for r, c in corners if matrix[r, c].numel()]
