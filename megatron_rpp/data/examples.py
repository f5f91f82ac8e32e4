"""Worked examples for the supervised warm-up: a prompt and the response to imitate."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rpp.config.schema import Data
from megatron_rpp.data.rows import BadRow, iter_rows
from megatron_rpp.data.template import check_template, encode
from megatron_rpp.errors import DataError
from megatron_rpp.types import Group, Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE_KEY = "response"


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples in file order: `groups[i]` answers `prompts[i]` with one response, whose log-probability is nobody's (0)."""

    prompts: tuple[Prompt, ...]
    group_of: dict[str, Group]


def load_examples(cfg: Data, tokenizer: PreTrainedTokenizerBase, path: Path, *, max_tokens: int) -> ExampleSet:
    """Read rows {prompt_key, "response"} and tokenise both; the end token is appended to every response.

    A row that repeats another is kept once. Prompt and response together must fit `max_tokens`.
    Raises: DataError naming file and line for the first row that cannot be used, and for an empty file.
    """
    check_template(tokenizer, cfg.template, cfg.system)
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token", where=str(path), fix="set eos_token in tokenizer_config.json")
    group_of: dict[str, Group] = {}
    for row in iter_rows(path, [cfg.prompt_key, RESPONSE_KEY]):
        if isinstance(row, BadRow):
            raise DataError(row.reason, where=f"{path}:{row.line}")
        group = _group(row.fields, f"{path}:{row.line}", cfg, tokenizer)
        length = len(group.prompt.tokens) + len(group.responses[0].tokens)
        if length > max_tokens:
            raise DataError("the example is too long", where=f"{path}:{row.line}", expected=f"at most {max_tokens} tokens", got=length)
        group_of[group.prompt.uid] = group
    if not group_of:
        raise DataError("the file holds no example", where=str(path))
    return ExampleSet(tuple(group.prompt for group in group_of.values()), group_of)


def _group(fields: dict[str, object], where: str, cfg: Data, tokenizer: PreTrainedTokenizerBase) -> Group:
    texts = []
    for key in (cfg.prompt_key, RESPONSE_KEY):
        text = fields.get(key)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{key!r} must be text", where=where, got=repr(text))
        texts.append(text)
    prompt, response = texts
    uid = hashlib.blake2b(f"{prompt}\x1f{response}".encode(), digest_size=16).hexdigest()
    tokens = (*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id)
    return Group(
        Prompt(uid=uid, tokens=encode(tokenizer, prompt, template=cfg.template, system=cfg.system), text=prompt, answer=response),
        (Response(uid, 0, tokens, (0.0,) * len(tokens), response, "stop", version=0, score=0.0),),
    )
