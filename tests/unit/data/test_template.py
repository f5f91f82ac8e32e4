"""Tokenizers from HF directories, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.data.template import EncodeError, check_template, load_tokenizer
from megatron_rpp.errors import DataError

from .builders import CHAT_TEMPLATE, byte_codec, byte_tokenizer


def test_a_saved_tokenizer_loads_with_its_chat_template(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    check_template(tokenizer, "chat", None)
    assert tokenizer.decode(byte_codec(tokenizer).encode_prompt("hi").tokens) == "<user>hi<assistant>"


def test_a_missing_or_empty_directory_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)


BROKEN = {
    "another version": {"version": "9.0"},
    "an unknown model": {"model": {"type": "FromTheFuture", "vocab": {}}},
    "an unknown normalizer": {"normalizer": {"type": "Shout"}},
    "a vocabulary that is a number": {"model": {"type": "BPE", "vocab": 7, "merges": []}},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_tokenizer_file_that_the_library_cannot_read_is_one_error_that_names_it(tmp_path: Path, change: dict[str, object]) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="the tokenizer does not load") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_refused_before_any_row() -> None:
    with pytest.raises(DataError, match=r"no chat template[\s\S]*data.template=none"):
        check_template(byte_tokenizer(chat_template=None), "chat", None)


def test_named_chat_templates_need_a_default_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"none of them is the default[\s\S]*got: rag, tool_use"):
        check_template(load_tokenizer(tmp_path), "chat", None)
    tokenizer.chat_template["default"] = CHAT_TEMPLATE
    check_template(tokenizer, "chat", None)
    assert tokenizer.decode(byte_codec(tokenizer).encode_prompt("hi").tokens) == "<user>hi<assistant>"


def test_a_system_message_without_a_template_is_a_contradiction() -> None:
    with pytest.raises(DataError, match="system message needs a chat template"):
        check_template(byte_tokenizer(), "none", "be brief")


FAULTS = {
    "{{ messages[0].content + 1 }}": "the chat template fails on the messages: TypeError",
    "{{ 1 // 0 }}": "the chat template fails on the messages: ZeroDivisionError",
    "{{ messages[0].content.absent.more }}": "the chat template refuses the messages",
    "{{ raise_exception('not today') }}": "the chat template refuses the messages: not today",
    "{% for n in range(10 ** 9) %}{% endfor %}": "the chat template fails on the messages: OverflowError",
}


@pytest.mark.parametrize(("template", "message"), FAULTS.items())
def test_whatever_goes_wrong_inside_a_template_is_a_fault_of_the_row(template: str, message: str) -> None:
    with pytest.raises(EncodeError, match=message):
        byte_codec(byte_tokenizer(chat_template=template)).encode_prompt("q")


def test_a_template_that_does_not_parse_is_said_once_with_its_line() -> None:
    with pytest.raises(DataError, match=r"line 2: the chat template does not parse"):
        byte_codec(byte_tokenizer(chat_template="{{ messages }}\n{% if %}")).encode_prompt("q")
