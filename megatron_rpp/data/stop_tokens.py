"""The tokens that end a response, from everything in a model's directory that names one.

config.json, generation_config.json and the tokenizer often disagree: a base model with a chat tokenizer has one
end token in its config and another in its template. A response that stops at only one of them may never stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.errors import ConfigError, DataError
from megatron_rpp.input_file import read_object

SETTING = "rollout.stop_tokens"
TOKENIZER_CONFIG = "tokenizer_config.json"
# In the order in which `rpp sft` prefers them.
_TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json")
_MODEL_FILES = ("generation_config.json", "config.json")

Encode = Callable[[str], Sequence[int]]  # text to token ids; it adds no special tokens


@dataclass(frozen=True, slots=True)
class StopToken:
    """One token that ends a response.

    id: its row in the model's vocabulary.
    sources: the files and settings that name it.
    """

    id: int
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopTokens:
    """Every token that ends a response, the preferred one first.

    warnings: end tokens that are named and cannot be used, and a tokenizer without its configuration.
    """

    tokens: tuple[StopToken, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """What an engine stops at."""
        return tuple(sorted(token.id for token in self.tokens))

    @property
    def end(self) -> int:
        """What `rpp sft` appends to a response: the tokenizer's end token where there is one."""
        return self.tokens[0].id

    def describe(self, text_of: Callable[[int], str]) -> str:
        """The tokens on one line. text_of: the text of a token id."""
        return ", ".join(f"{token.id} {text_of(token.id)!r} ({', '.join(token.sources)})" for token in self.tokens)


def read_stop_tokens(hf_dir: Path, encode: Encode, *, vocab_size: int, more: Sequence[int | str] = ()) -> StopTokens:
    """The union of what the tokenizer's files, generation_config.json, config.json and `more` name.

    encode: the tokenizer's.
    vocab_size: rows of the model's embedding. A named token without a row can never be sampled; it is left out with a warning.
    more: the setting rollout.stop_tokens, token ids or the texts of single tokens.
    Raises: ConfigError for an entry of `more` that is not a token of the model; DataError when nothing ends a response, or a
    file does not read.
    """
    found: dict[int, list[str]] = {}
    named: list[str] = []
    unusable: list[str] = []
    for source, value in _named_tokens(hf_dir):
        ids = encode(value) if isinstance(value, str) else (value,)
        named.append(f"{value!r} in {source}")
        if len(ids) == 1 and 0 <= ids[0] < vocab_size:
            found.setdefault(ids[0], []).append(source)
        else:
            unusable.append(f"the end token {value!r} of {hf_dir / source} is not a token of the model: no response ends with it")
    for value in more:
        found.setdefault(_single_token(value, encode, vocab_size), []).append(SETTING)
    if not found:
        raise DataError(
            "no token ends a response: every response would run to its length limit",
            where=str(hf_dir),
            expected=f"an end token with an id below {vocab_size} in {', '.join((*_TOKENIZER_FILES, *_MODEL_FILES))}",
            got=", ".join(named) or "none",
            fix=f"set eos_token_id in generation_config.json, or {SETTING}, for example ['<|im_end|>']",
        )
    if not any((hf_dir / name).is_file() for name in _TOKENIZER_FILES):
        ends = ", ".join(f"{token} ({', '.join(sources)})" for token, sources in found.items())
        unusable.append(f"{hf_dir} has no {TOKENIZER_CONFIG}: the tokenizer names no end token; stop tokens: {ends}")
    return StopTokens(tuple(StopToken(token, tuple(sources)) for token, sources in found.items()), tuple(unusable))


def _named_tokens(hf_dir: Path) -> Iterator[tuple[str, int | str]]:
    """(file, id or text) of every end token that the directory names."""
    yield from _tokenizer_token(hf_dir)
    for name in _MODEL_FILES:
        value = read_object(hf_dir / name, DataError, default={}).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not isinstance(token, int | None):
                where, expected = f"{hf_dir / name}: eos_token_id", "a token id, or a list of token ids"
                raise DataError("the end token is not a token id", where=where, expected=expected, got=repr(value))
            if token is not None:
                yield name, token


def _tokenizer_token(hf_dir: Path) -> Iterator[tuple[str, str]]:
    """The end token of the tokenizer, from the first of its files that names one, or says that it has none.

    If no file names one, the default of the tokenizer's class is not used: it may not be the model's.
    """
    for name in _TOKENIZER_FILES:
        raw = read_object(hf_dir / name, DataError, default={})
        if "eos_token" not in raw:
            continue
        token = raw["eos_token"]
        text = token.get("content") if isinstance(token, dict) else token  # AddedToken is written as an object
        if isinstance(text, str) and text:
            yield name, text
        return


def _single_token(value: int | str, encode: Encode, vocab_size: int) -> int:
    ids = encode(value) if isinstance(value, str) else (value,)
    if len(ids) != 1:
        raise ConfigError(
            f"{value!r} is not a single token of this tokenizer",
            where=SETTING,
            expected="token ids, or texts of one token each",
            got=f"{len(ids)} tokens: {list(ids)[:8]}",
            fix="name the one token that should end a response",
        )
    if not 0 <= ids[0] < vocab_size:
        raise ConfigError(
            f"token {ids[0]} is not in the model's vocabulary",
            where=SETTING,
            expected=f"an id from 0 to {vocab_size - 1}",
            got=repr(value),
        )
    return ids[0]
