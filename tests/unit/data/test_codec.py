"""Text to token ids of one model, and back."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rpp.data.template import EncodeError

from .builders import byte_codec, byte_tokenizer


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(EncodeError, match=r"data.template=chat"):
        byte_codec(template="none").encode_prompt([{"role": "user", "content": "q"}])


def test_the_template_writes_the_special_tokens_and_encoding_adds_none() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ bos_token }}{{ messages[0].content }}")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer._tokenizer.post_processor = _bos_processor(tokenizer.bos_token_id)
    assert tokenizer.encode("q")[0] == tokenizer.bos_token_id  # it would add one by itself
    assert byte_codec(tokenizer).encode_prompt("q").tokens.count(tokenizer.bos_token_id) == 1
    assert byte_codec(tokenizer, template="none").encode_prompt("q").tokens.count(tokenizer.bos_token_id) == 1


def _bos_processor(bos_token_id: int):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_token_id)])


def test_a_response_ends_with_the_end_token() -> None:
    codec = byte_codec(end=5)
    assert codec.encode_response("hi") == (*codec.tokenizer.encode("hi"), 5)
    assert codec.encode_response("") == (5,)


def test_a_response_token_without_a_row_is_refused_with_its_place() -> None:
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(EncodeError, match=rf"response token {rows} \('<new>', at position 1\) is not in the model"):
        byte_codec(tokenizer, vocab_size=rows).encode_response("a<new>")
    with pytest.raises(EncodeError, match=rf"response token {rows} .*at position 2"):
        byte_codec(tokenizer, vocab_size=rows, end=rows).encode_response("ab")  # the end token itself


def test_a_tokenizer_that_fails_on_a_text_is_a_fault_of_the_row() -> None:
    """A word-level tokenizer without an unknown token raises a bare Exception."""
    backend = Tokenizer(models.WordLevel(vocab={"a": 0}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = byte_codec(PreTrainedTokenizerFast(tokenizer_object=backend), template="none")
    assert codec.encode_prompt("a a").tokens == (0, 0)
    with pytest.raises(EncodeError, match="the tokenizer fails on the text"):
        codec.encode_prompt("a b")
    with pytest.raises(EncodeError, match="the tokenizer fails on the text"):
        byte_codec().encode_response("\ud800")


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 31, 32, 33, 200, 3000])
def test_a_text_is_longer_only_when_it_is(num_tokens: int) -> None:
    """Never said of a text within the limit; always of one far beyond it."""
    codec, limit = byte_codec(), 16
    assert codec.is_longer("x" * num_tokens, limit) is (num_tokens > 8 * limit)


@pytest.mark.parametrize("length", [2, 7, 100, 1000])
def test_a_long_text_of_few_tokens_is_not_longer(length: int) -> None:
    """A prefix that ends inside a long token has many short ones at its end."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["y" * length])
    codec = byte_codec(tokenizer)
    assert len(tokenizer.encode("y" * length * 16)) == 16
    assert not codec.is_longer("y" * length * 16, 16)
    assert codec.is_longer("y" * length * 10_000, 16)
