"""Prompt files, row by row, and the order in which a run draws from them.

A row is an object with the problem (text, or a list of {role, content} messages) and its answer. Every row is checked by
itself, so that one bad line of a million costs one line in a report, or stops the run with its place, as `data.on_bad_row`
says.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.config.schema import Data
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.rows import BadRow, Row, field_of, iter_rows, number_text
from megatron_rpp.data.template import EncodeError, Messages
from megatron_rpp.errors import DataError
from megatron_rpp.types import Prompt

MAX_BAD_ROWS_SHOWN = 10


class _RowError(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a file, in file order, and the rows left out."""

    path: Path
    prompts: tuple[Prompt, ...]
    bad_rows: tuple[BadRow, ...]


def load_prompts(cfg: Data, codec: Codec, *, path: Path | None = None) -> PromptSet:
    """Read, check and encode `path` (default: `cfg.train`), a .jsonl or .parquet file.

    Raises: DataError when the file cannot be read, holds no usable row, or holds a bad one and `cfg.on_bad_row` is "error".
    """
    path = cfg.train if path is None else path
    prompts: dict[str, Prompt] = {}
    first_line: dict[str, int] = {}
    bad_rows: list[BadRow] = []
    columns = [key for key in (cfg.prompt_key, cfg.answer_key, cfg.domain_key) if key is not None]
    for row in iter_rows(path, columns):
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        try:
            prompt = _prompt_of(row, cfg, codec)
            if prompt.uid in prompts:
                raise _RowError(f"the same problem and answer as line {first_line[prompt.uid]}")
        except (_RowError, EncodeError) as error:
            bad_rows.append(BadRow(str(path), row.line, str(error)))
            continue
        prompts[prompt.uid] = prompt
        first_line[prompt.uid] = row.line
    if bad_rows and cfg.on_bad_row == "error":
        raise _bad_rows_error(path, bad_rows, len(prompts))
    if not prompts:
        got = _listed(bad_rows) if bad_rows else "an empty file"
        raise DataError("the file holds no usable row", where=str(path), got=got)
    return PromptSet(path, tuple(prompts.values()), tuple(bad_rows))


def _prompt_of(row: Row, cfg: Data, codec: Codec) -> Prompt:
    problem = _problem(_field(row, cfg.prompt_key), cfg.prompt_key)
    answer = _answer(_field(row, cfg.answer_key), cfg)
    domain = "default" if cfg.domain_key is None else _text(_field(row, cfg.domain_key), cfg.domain_key)
    _check_length(problem, cfg, codec)
    prompt = codec.encode_prompt(problem)
    if not prompt.tokens:
        raise _RowError(f"{cfg.prompt_key!r} has no token")
    if len(prompt.tokens) > cfg.max_prompt_tokens:
        limit = f"data.max_prompt_tokens={cfg.max_prompt_tokens}"
        raise _RowError(f"{len(prompt.tokens)} prompt tokens, more than {limit}")
    text = problem if isinstance(problem, str) else problem[-1]["content"]
    uid = _uid(problem, answer, domain)
    return Prompt(uid=uid, tokens=prompt.tokens, text=text, answer=answer, domain=domain, end=prompt.end)


def _check_length(problem: str | Messages, cfg: Data, codec: Codec) -> None:
    """Refuse a huge row before it is encoded as a whole."""
    texts = [problem] if isinstance(problem, str) else [message["content"] for message in problem]
    for text in texts:
        if codec.is_longer(text, cfg.max_prompt_tokens):
            limit = f"data.max_prompt_tokens={cfg.max_prompt_tokens}"
            raise _RowError(f"{len(text)} characters, which is far more than {limit} allows")


def _uid(problem: str | Messages, answer: str, domain: str) -> str:
    content = json.dumps([problem, answer, domain], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _field(row: Row, key: str) -> object:
    value = field_of(row.fields, key)
    if value is None:
        present = ", ".join(sorted(row.fields)) or "none"
        raise _RowError(f"field {key!r} is missing (fields: {present})")
    return value


def _problem(value: object, key: str) -> str | list[dict[str, str]]:
    if not isinstance(value, list):
        return _text(value, key)
    if not value:
        raise _RowError(f"{key!r} is an empty list of messages")
    messages = []
    for place, message in enumerate(value):
        name = f"{key}[{place}]"
        if not isinstance(message, Mapping):
            raise _RowError(f"{name} must be an object with 'role' and 'content'")
        # A table has one set of columns for all messages: the fields that a message does not use are null.
        used = {part for part, content in message.items() if content is not None}
        if unknown := sorted(used - {"role", "content"}):
            raise _RowError(f"{name} has a field {unknown[0]!r}; only 'role' and 'content' are read")
        if lacking := sorted({"role", "content"} - used):
            raise _RowError(f"{name} has no {lacking[0]!r}")
        messages.append({part: _text(message[part], f"{name}.{part}") for part in ("role", "content")})
    if messages[-1]["role"] != "user":
        raise _RowError(f"the last message of {key!r} is the {messages[-1]['role']}'s, expected the user's")
    return messages


def _answer(value: object, cfg: Data) -> str:
    """Answers may be numbers: 27.0 is "27"."""
    try:
        number = number_text(value)
    except ValueError as error:
        raise _RowError(f"{cfg.answer_key!r} {error}") from None
    text = _text(value, cfg.answer_key) if number is None else number
    if cfg.answer_after is None:
        return text
    _, marker, rest = text.rpartition(cfg.answer_after)
    if not marker or not rest.strip():
        raise _RowError(f"{cfg.answer_key!r} holds no text after {cfg.answer_after!r} (data.answer_after)")
    return rest.strip()


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{key!r} is of type {type(value).__name__}, expected text")
    if not value.strip():
        raise _RowError(f"{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RowError(f"{key!r} holds half of a surrogate pair") from None
    return value


def _bad_rows_error(path: Path, bad_rows: list[BadRow], num_good: int) -> DataError:
    return DataError(
        f"{len(bad_rows)} of {len(bad_rows) + num_good} rows cannot be used",
        where=str(path),
        got=_listed(bad_rows),
        fix="mend the rows, or set data.on_bad_row=skip to leave them out",
    )


def _listed(bad_rows: list[BadRow]) -> str:
    """The first of them, a line each."""
    shown = [f"    {bad}" for bad in bad_rows[:MAX_BAD_ROWS_SHOWN]]
    if len(bad_rows) > MAX_BAD_ROWS_SHOWN:
        shown.append(f"    ... and {len(bad_rows) - MAX_BAD_ROWS_SHOWN} more")
    return "\n" + "\n".join(shown)


def fingerprint(prompts: Iterable[Prompt], seed: int = 0) -> str:
    """Of the prompts, their order in the file and the seed."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for prompt in prompts:
        digest.update(prompt.uid.encode())
    return digest.hexdigest()


class PromptStream:
    """Prompts in seeded, shuffled epochs: every prompt once in an epoch, never twice in one `take`.

    The order depends on the seed and on the prompts' uids in file order alone. An epoch that ends inside a `take` flows
    into the next one; the prompts that this take already holds move to the end of the new epoch.
    """

    def __init__(self, prompts: Iterable[Prompt], seed: int) -> None:
        self._prompts = tuple(prompts)
        if not self._prompts:
            raise DataError("there is no prompt to draw from", where="PromptStream")
        self._seed = seed
        self._begin_epoch(0, [])
        self._position = 0

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    def num_without(self, uids: Set[str]) -> int:
        """Prompts of an epoch that are none of `uids`."""
        return sum(prompt.uid not in uids for prompt in self._prompts)

    def take(self, count: int, *, without: Set[str] = frozenset()) -> tuple[Prompt, ...]:
        """The next `count` prompts that are none of `without` (what was taken just before, and must not come again so soon).

        Raises: DataError when there are fewer in the whole set.
        """
        if not 1 <= count <= self.num_without(without):
            raise DataError(
                f"{count} different prompts were asked for",
                where="rollout.prompts_per_step",
                expected=f"1 to {len(self._prompts)}, the usable prompts of data.train",
                fix="lower rollout.prompts_per_step or add prompts",
            )
        taken = self._pick(count, without)
        if missing := count - len(taken):
            avoided = [index for index, prompt in enumerate(self._prompts) if prompt.uid in without and index not in taken]
            self._begin_epoch(self._epoch + 1, taken + avoided)
            self._position = 0
            taken = taken + self._pick(missing, without)
        return tuple(self._prompts[index] for index in taken)

    def _pick(self, count: int, without: Set[str]) -> list[int]:
        """Up to `count` of what is left of the epoch. One of `without` that is met has been taken in the epoch before."""
        picked: list[int] = []
        while len(picked) < count and self._position < len(self._order):
            index = self._order[self._position]
            self._position += 1
            if self._prompts[index].uid not in without:
                picked.append(index)
        return picked

    def _begin_epoch(self, epoch: int, held_back: list[int]) -> None:
        """Shuffle for `epoch`, with the indices in `held_back` at the end."""
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # a text seed is hashed whole: neighbours do not correlate
        last = set(held_back)
        self._epoch, self._held_back = epoch, list(held_back)
        self._order = [index for index in order if index not in last] + self._held_back

    def _fingerprint(self) -> str:
        return fingerprint(self._prompts, self._seed)

    def state_dict(self) -> dict[str, object]:
        """What `load_state_dict` needs to go on: plain JSON values."""
        return {"fingerprint": self._fingerprint(), "epoch": self._epoch, "position": self._position, "held_back": self._held_back}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where `state` was taken. Raises: DataError when it belongs to other prompts or another seed, or is not a state."""
        num_prompts = len(self._prompts)
        held_back = state.get("held_back")
        are_indices = isinstance(held_back, list) and all(type(n) is int and 0 <= n < num_prompts for n in held_back)
        counts = [state.get("epoch"), state.get("position")]
        are_counts = all(type(n) is int and n >= 0 for n in counts) and isinstance(state.get("fingerprint"), str)
        if not are_indices or not are_counts or len(set(held_back)) != len(held_back) or counts[1] > num_prompts:
            raise DataError(
                "the saved position in the prompts is damaged",
                where="PromptStream",
                expected=f"fingerprint, epoch, a position up to {num_prompts} and indices below it that are held back",
                got=ascii({name: state.get(name) for name in self.state_dict()})[:200],
                fix="continue from an older checkpoint",
            )
        if state["fingerprint"] != self._fingerprint():
            raise DataError(
                "the saved position belongs to other prompts or another seed",
                where="PromptStream",
                expected=f"state of prompts {self._fingerprint()}",
                got=state["fingerprint"],
                fix="resume with the data.train and run.seed that the checkpoint was made with, or start a new run directory",
            )
        self._begin_epoch(state["epoch"], state["held_back"])
        self._position = state["position"]
