"""A Qwen3 model of 0.8 M parameters with random weights, and a tokenizer that reads any text, both in HF format."""

from __future__ import annotations

from pathlib import Path

import torch
from chains import ANSWER, COMMA, STEPS, STOP
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 320  # the tokenizer's 265 tokens, rounded up so that it divides over tensor-parallel ranks
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 384, 4, 4, 2, 32
INIT_STD = 0.06  # wide for its size: from the usual 0.02 the warm-up learns the steps about half as fast


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """One token for each byte, so that nothing is unknown, and one for each word of the quickstart's answers."""
    specials = [PAD, END, SYSTEM, USER, ASSISTANT]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    backend.add_tokens([AddedToken(word, normalized=False) for word in (STEPS, COMMA, STOP, ANSWER)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHAT_TEMPLATE,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_model(directory: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> int:
    """Config and random weights under their HF names. Returns the number of parameters."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        dtype="float32",
        bos_token_id=None,
        **tokens,
    )
    config.save_pretrained(directory)
    GenerationConfig(**tokens).save_pretrained(directory)
    weights = _random_weights(seed)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.numel() for weight in weights.values())


def _random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Normal matrices and unit norms."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{block}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{block}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{block}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{block}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{block}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{block}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
            f"{block}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{block}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{block}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * INIT_STD for name, shape in shapes.items()
    }
