"""Tokenizers of Hugging Face directories, and the chat templates in them. The only importer of transformers in this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_rpp.errors import DataError
from megatron_rpp.input_file import why_unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
Template = Literal["chat", "none"]

# What transformers and tokenizers read whole.
_READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
_MAX_BYTES = 2**30


class EncodeError(ValueError):
    """Why one text cannot be encoded: a fault of one row, not of the run."""


def load_tokenizer(hf_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local HF directory; nothing is downloaded. Raises: DataError when there is none or it does not load."""
    check_files(hf_dir)
    import megatron_rpp_patches

    megatron_rpp_patches.apply("torchvision")  # Llama's classes import torchvision, which a CPU build of torch cannot load
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare one for a file that it does not understand
        raise load_error(hf_dir, error) from error


def check_files(hf_dir: Path) -> None:
    """Raises: DataError for a directory with a file that libraries would wait for, or read without end."""
    if reason := why_unreadable(hf_dir, is_directory=True):
        raise DataError(f"there is no tokenizer: {reason}", where=f"tokenizer {hf_dir}", fix="set model.hf to a downloaded HF directory")
    for path in sorted(path for pattern in _READ for path in hf_dir.glob(pattern)):
        if path.is_dir() or not path.exists():  # a link that leads nowhere is as good as no file
            continue
        if reason := why_unreadable(path):
            raise DataError("cannot read the file", where=str(path), got=reason, fix="download the file again")
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise DataError("the file is too large", where=str(path), expected=f"at most {_MAX_BYTES:,} bytes", got=f"{size:,} bytes")


def load_error(hf_dir: Path, error: Exception) -> DataError:
    """The error to raise for a tokenizer whose files do not load."""
    fix = "download the tokenizer's files again, or save them with this version of transformers"
    if isinstance(error, ImportError):
        fix = "install the package that the error names, for example sentencepiece for a tokenizer.model"
    return DataError(
        "the tokenizer does not load",
        where=f"tokenizer {hf_dir}",
        expected="tokenizer.json and tokenizer_config.json that the installed transformers and tokenizers read",
        got=f"{type(error).__name__}: {error}",
        fix=fix,
    )


def check_template(tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None) -> None:
    """Raises: DataError when the tokenizer or the settings cannot do what `template` asks."""
    if template == "none":
        if system is not None:
            fix = "remove data.system, or set data.template=chat"
            raise DataError("a system message needs a chat template", where="data.system", fix=fix)
        return
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where="data.template=chat",
            expected=f"a chat template in {tokenizer.name_or_path}",
            fix="use an instruct model's directory, or data.template=none for a base model",
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise DataError(
            "the tokenizer has named chat templates and none of them is the default",
            where=f"data.template=chat, {tokenizer.name_or_path}",
            expected="a template named 'default'",
            got=", ".join(sorted(tokenizer.chat_template)),
            fix="rename the template that prompts should use to 'default' in tokenizer_config.json",
        )


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The conversation as the chat template writes it, up to the start of the assistant's turn.

    Raises: EncodeError when the template refuses the messages or fails on them; DataError when it does not parse, which
    no row can change.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise DataError(
            "the chat template does not parse",
            where=f"chat template of {tokenizer.name_or_path}, line {error.lineno}",
            got=error.message,
            fix="repair the template in chat_template.jinja or tokenizer_config.json",
        ) from error
    except TemplateError as error:
        raise EncodeError(f"the chat template refuses the messages: {error}") from error
    except Exception as error:  # the template is a program: it can divide by zero or add a word to a number
        raise EncodeError(f"the chat template fails on the messages: {type(error).__name__}: {error}") from error
