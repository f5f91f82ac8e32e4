"""Small groups and tokenizers for the data tests."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rpp.data.codec import Codec
from megatron_rpp.data.stop_tokens import StopToken, StopTokens
from megatron_rpp.types import Group, Prompt, Response

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, so that a test can read token ids as text."""
    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


def byte_codec(
    tokenizer: PreTrainedTokenizerFast | None = None, *, vocab_size: int | None = None, end: int = 0, **settings: object
) -> Codec:
    """A codec of the byte tokenizer, or of another, with one row for each of its tokens. end: the only stop token."""
    tokenizer = tokenizer or byte_tokenizer()
    stop = StopTokens((StopToken(end, ("config.json",)),))
    longest = max(map(len, tokenizer.get_vocab()))
    return Codec(tokenizer, len(tokenizer) if vocab_size is None else vocab_size, stop, longest, **settings)


def make_prompt(number: int, num_tokens: int = 2) -> Prompt:
    return Prompt(uid=f"p{number}", tokens=tuple(range(100 * number, 100 * number + num_tokens)), text=f"q{number}", answer=str(number))


def make_response(prompt: Prompt, sample: int, num_tokens: int) -> Response:
    """Tokens and log-probabilities differ from one response to the next and from one place to the next."""
    tokens = tuple(10_000 + 1_000 * sample + prompt.tokens[0] + place for place in range(num_tokens))
    logp = tuple(-(token % 997) / 1000 for token in tokens)
    return Response(prompt.uid, sample, tokens, logp, "text", "stop" if sample % 2 else "length", version=7, score=sample / 2)


def make_groups(response_lengths: Sequence[Sequence[int]], prompt_tokens: int = 2) -> tuple[Group, ...]:
    """One group for each inner list, one response for each length in it."""
    groups = []
    for number, lengths in enumerate(response_lengths):
        prompt = make_prompt(number, prompt_tokens)
        groups.append(Group(prompt, tuple(make_response(prompt, sample, length) for sample, length in enumerate(lengths))))
    return tuple(groups)
