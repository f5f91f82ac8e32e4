"""Between text and the token ids of one model: prompts and responses in, responses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import models_read
from megatron_rpp.data.stop_tokens import StopTokens, read_stop_tokens
from megatron_rpp.data.template import EncodeError, Messages, Template, check_template, load_tokenizer, render
from megatron_rpp.hf.model import read_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARS_PER_TOKEN = 8  # where `is_longer` starts to look; text has about 4, and code with long blanks has more
_THOUGHT = "<think>"
_MARK = "RPPLASTMESSAGE"  # stands for the last message where only what follows it is wanted


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    tokens: token ids.
    end: what the chat template wrote after the last message, for example "<|assistant|><think>".
    """

    tokens: tuple[int, ...]
    end: str


@dataclass(frozen=True, slots=True)
class Codec:
    """A tokenizer with all that decides how this run uses it.

    tokenizer: of model.hf.
    vocab_size: rows of the embedding, of the smallest one when several models read the same tokens.
    stop: the tokens that end a response.
    longest_token: characters of the longest token.
    template, system: as in the section `data`.
    warnings: what a user should know before the run starts.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop: StopTokens
    longest_token: int
    template: Template = "chat"
    system: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def open(cls, cfg: Config, *, policy_only: bool = False) -> Codec:
        """The codec of model.hf. policy_only: neither the reference nor the critic reads the tokens.

        Raises: DataError, ConfigError when its files or the settings do not fit.
        """
        hf = cfg.model.hf
        tokenizer = load_tokenizer(hf)
        check_template(tokenizer, cfg.data.template, cfg.data.system)
        vocab_size = vocab_size_of(cfg, policy_only=policy_only)
        stop = read_stop_tokens(
            hf,
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            vocab_size=vocab_size,
            more=cfg.rollout.stop_tokens,
        )
        warnings = (*long_tokenizer_warnings(len(tokenizer), vocab_size), *stop.warnings)
        longest_token = max(map(len, tokenizer.get_vocab()))
        return cls(tokenizer, vocab_size, stop, longest_token, cfg.data.template, cfg.data.system, warnings)

    def encode_prompt(self, problem: str | Messages) -> EncodedPrompt:
        """Token ids that the model continues: a rendered chat up to the assistant's turn, or the text itself.

        With template "chat" the whole conversation is rendered, with `system` before it unless it brings its own.
        With "none" the text is encoded as the tokenizer does by default (with a beginning-of-text token where the
        model has one).
        Raises: EncodeError when the chat template refuses the messages, messages come with template "none", or a token
        has no row in the model.
        """
        if self.template == "none":
            if not isinstance(problem, str):
                raise EncodeError("a list of messages needs data.template=chat")
            tokens = self._encode(problem, add_special_tokens=True)
            return EncodedPrompt(self._checked(tokens, "prompt"), _open_thought(problem))
        messages = self._messages(problem)
        tokens = self._encode(render(self.tokenizer, messages))  # the template has written the special tokens
        # Rendered once more with a mark for the last message: its own text may look like the template's.
        marked = render(self.tokenizer, [*messages[:-1], messages[-1] | {"content": _MARK}])
        return EncodedPrompt(self._checked(tokens, "prompt"), marked.rpartition(_MARK)[2])

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Token ids of a response to imitate, with the end token. Raises: EncodeError when a token has no row in the model."""
        return self._checked((*self._encode(text), self.stop.end), "response")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def text_of(self, token: int) -> str:
        """The text of one token, special or not."""
        return self.tokenizer.decode([token])

    def is_longer(self, text: str, max_tokens: int) -> bool:
        """Whether `text` surely has more than `max_tokens` tokens, told without encoding much more than these.

        Growing prefixes are encoded, so that a text of a gigabyte costs no more than one of the allowed length. The cut
        at the end of a prefix may split one token into as many as it has characters; these do not count.
        """
        size = _CHARS_PER_TOKEN * max_tokens
        while size < len(text):
            if len(self._encode(text[:size])) > max_tokens + self.longest_token:
                return True
            size *= 2
        return False

    def _messages(self, problem: str | Messages) -> list[dict[str, str]]:
        if isinstance(problem, str):
            problem = [{"role": "user", "content": problem}]
        has_system = problem[0]["role"] == "system"
        first = [] if self.system is None or has_system else [{"role": "system", "content": self.system}]
        return [*first, *map(dict, problem)]

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> Sequence[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the tokenizers library raises a bare Exception, for example without an unknown token
            raise EncodeError(f"the tokenizer fails on the text: {type(error).__name__}: {error}") from error

    def _checked(self, tokens: Sequence[int], what: str) -> tuple[int, ...]:
        """An id beyond the embedding reads foreign memory or kills the engine, whatever layout the model has."""
        for place, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise EncodeError(
                    f"{what} token {token} ({name!r}, at position {place}) is not in the model, "
                    f"which has {self.vocab_size} rows (vocab_size in config.json)"
                )
        return tuple(tokens)


def vocab_size_of(cfg: Config, *, policy_only: bool = False) -> int:
    """Rows of the smallest embedding among the policy and, in training, the reference and the critic. Raises: ConfigError."""
    return min(read_model(hf, for_engine=True).vocab_size for _, hf in models_read(cfg, policy_only=policy_only))


def long_tokenizer_warnings(num_tokens: int, vocab_size: int) -> list[str]:
    """What a user has to know about a tokenizer with more tokens than the model has rows."""
    if num_tokens <= vocab_size:
        return []
    return [
        f"the tokenizer has {num_tokens} tokens and the model has {vocab_size} rows: "
        f"texts with token ids of {vocab_size} or more are refused"
    ]


def _open_thought(text: str) -> str:
    """The opening tag that a plain text ends with, as DeepSeek-R1-Zero's prompt does; else nothing."""
    return _THOUGHT if text.rstrip().endswith(_THOUGHT) else ""
