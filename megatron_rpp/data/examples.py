"""Worked examples for the supervised warm-up: a prompt and the response to imitate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.config.schema import Data
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.rows import BadRow, field_of, iter_rows
from megatron_rpp.data.template import EncodeError
from megatron_rpp.errors import DataError
from megatron_rpp.types import Group, Prompt, Response

RESPONSE_KEY = "response"


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples in file order: `groups[i]` answers `prompts[i]` with one response, whose log-probability is nobody's (0)."""

    prompts: tuple[Prompt, ...]
    group_of: dict[str, Group]


def load_examples(cfg: Data, codec: Codec, path: Path, *, max_tokens: int) -> ExampleSet:
    """Read rows {prompt_key, "response"} and encode both; an end token is appended to every response.

    A row that repeats another is kept once. Prompt and response together must fit `max_tokens`.
    Raises: DataError naming file and line for the first row that cannot be used, and for an empty file.
    """
    group_of: dict[str, Group] = {}
    for row in iter_rows(path, [cfg.prompt_key, RESPONSE_KEY]):
        if isinstance(row, BadRow):
            raise DataError(row.reason, where=f"{path}:{row.line}")
        group = _group(row.fields, f"{path}:{row.line}", cfg, codec, max_tokens)
        group_of[group.prompt.uid] = group
    if not group_of:
        raise DataError("the file holds no example", where=str(path))
    return ExampleSet(tuple(group.prompt for group in group_of.values()), group_of)


def _group(fields: Mapping[str, object], where: str, cfg: Data, codec: Codec, max_tokens: int) -> Group:
    texts = []
    limit = f"at most {max_tokens} tokens, data.max_prompt_tokens + rollout.max_response_tokens"
    for key in (cfg.prompt_key, RESPONSE_KEY):
        text = field_of(fields, key)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{key!r} must be text", where=where, got=repr(text)[:200])
        if codec.is_longer(text, max_tokens):
            raise DataError("the example is too long", where=where, expected=limit, got=f"{len(text)} characters in {key!r}")
        texts.append(text)
    prompt, response = texts
    try:
        encoded, tokens = codec.encode_prompt(prompt), codec.encode_response(response)
    except EncodeError as error:
        raise DataError(str(error), where=where) from error
    if (length := len(encoded.tokens) + len(tokens)) > max_tokens:
        raise DataError("the example is too long", where=where, expected=limit, got=f"{length} tokens")
    uid = hashlib.blake2b(f"{prompt}\x1f{response}".encode(), digest_size=16).hexdigest()
    return Group(
        Prompt(uid=uid, tokens=encoded.tokens, text=prompt, answer=response, end=encoded.end),
        (Response(uid, 0, tokens, (0.0,) * len(tokens), response, "stop", version=0, score=0.0),),
    )
