"""Tokenizers, and how a problem becomes prompt tokens. The only module of this package that imports transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_rpp.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
Template = Literal["chat", "none"]


class TemplateError(ValueError):
    """The chat template refuses these messages: a fault of one row, not of the run."""


def load_tokenizer(hf_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local HF directory; nothing is downloaded. Raises: DataError when there is none or it does not load."""
    from transformers import AutoTokenizer

    if not hf_dir.is_dir():
        raise DataError("there is no such directory", where=f"tokenizer {hf_dir}", fix="set model.hf to a downloaded HF directory")
    try:
        return AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            "the tokenizer does not load",
            where=f"tokenizer {hf_dir}",
            expected="tokenizer.json and tokenizer_config.json, or what the model's own tokenizer class reads",
            got=f"{type(error).__name__}: {error}",
        ) from error


def check_template(tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None) -> None:
    """Raises: DataError when the tokenizer or the settings cannot do what `template` asks."""
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where="data.template=chat",
            expected=f"a chat template in {tokenizer.name_or_path}",
            fix="use an instruct model's directory, or data.template=none for a base model",
        )
    if template == "none" and system is not None:
        raise DataError("a system message needs a chat template", where="data.system", fix="remove data.system, or set data.template=chat")


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, *, template: Template, system: str | None = None) -> tuple[int, ...]:
    """Token ids that the model continues: a rendered chat that ends where the assistant speaks, or the text itself.

    `template="chat"` renders the whole conversation, with `system` before it unless it brings its own. `"none"` tokenises
    the text as the tokenizer does by default (a beginning-of-text token included where the model has one).

    Raises: TemplateError when the chat template refuses the messages, or messages come with `template="none"`.
    """
    if template == "none":
        if not isinstance(prompt, str):
            raise TemplateError("a list of messages needs data.template=chat")
        return tuple(tokenizer.encode(prompt))
    from jinja2 import TemplateError as JinjaError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except JinjaError as error:
        raise TemplateError(f"the chat template refuses the messages: {error}") from error
    return tuple(tokenizer.encode(text, add_special_tokens=False))  # the template has written them
