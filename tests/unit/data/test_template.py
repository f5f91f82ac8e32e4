"""Tokenizers from HF directories, and chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rpp.data.template import TemplateError, check_template, encode, load_tokenizer
from megatron_rpp.errors import DataError

from .builders import byte_tokenizer


def test_a_saved_tokenizer_loads_with_its_chat_template(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    check_template(tokenizer, "chat", None)
    assert tokenizer.decode(encode(tokenizer, "hi", template="chat")) == "<user>hi<assistant>"


def test_a_missing_or_empty_directory_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_refused_before_any_row() -> None:
    with pytest.raises(DataError, match=r"no chat template[\s\S]*data.template=none"):
        check_template(byte_tokenizer(chat_template=None), "chat", None)


def test_a_system_message_without_a_template_is_a_contradiction() -> None:
    with pytest.raises(DataError, match="system message needs a chat template"):
        check_template(byte_tokenizer(), "none", "be brief")


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"data.template=chat"):
        encode(byte_tokenizer(), [{"role": "user", "content": "q"}], template="none")


def test_the_template_writes_the_special_tokens_and_encoding_adds_none() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ bos_token }}{{ messages[0].content }}")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer._tokenizer.post_processor = _bos_processor(tokenizer.bos_token_id)
    assert tokenizer.encode("q")[0] == tokenizer.bos_token_id  # it would add one by itself
    assert encode(tokenizer, "q", template="chat").count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, "q", template="none").count(tokenizer.bos_token_id) == 1


def _bos_processor(bos_token_id: int):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_token_id)])
