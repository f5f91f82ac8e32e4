"""What `rpp check` says about a tokenizer: from tokenizer.json alone, in a fraction of a second, where that is enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rpp.config.schema import Config
from megatron_rpp.data.codec import Codec, long_tokenizer_warnings, vocab_size_of
from megatron_rpp.data.stop_tokens import TOKENIZER_CONFIG, read_stop_tokens
from megatron_rpp.data.template import check_files, load_error
from megatron_rpp.errors import DataError
from megatron_rpp.input_file import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class TokenizerPreview:
    """What a run will do with the tokenizer.

    stop_tokens: the tokens that end a response, or why they are not known here.
    warnings: what a user should know before the run starts.
    """

    stop_tokens: str
    warnings: tuple[str, ...] = ()


def preview_tokenizer(cfg: Config) -> TokenizerPreview:
    """Read the tokenizer of model.hf. Raises: DataError, ConfigError for what would end the run at its start."""
    hf = cfg.model.hf
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return TokenizerPreview("unknown: the package tokenizers is not installed here")
    check_files(hf)
    if not (hf / FILE).is_file():
        return TokenizerPreview(f"unknown: {hf} has no {FILE}")
    try:
        tokenizer = Tokenizer.from_file(str(hf / FILE))
    except Exception as error:  # it raises a bare Exception for a file that it does not understand
        raise load_error(hf, error) from error
    if _gets_more_tokens(hf, tokenizer):
        codec = Codec.open(cfg)  # takes seconds: only transformers knows what it adds
        return TokenizerPreview(codec.stop.describe(codec.text_of), codec.warnings)
    vocab_size = vocab_size_of(cfg)
    stop = read_stop_tokens(
        hf,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        vocab_size=vocab_size,
        more=cfg.rollout.stop_tokens,
    )
    text = stop.describe(lambda token: tokenizer.decode([token], skip_special_tokens=False))
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    return TokenizerPreview(text, (*long_tokenizer_warnings(num_tokens, vocab_size), *stop.warnings))


def _gets_more_tokens(hf: Path, tokenizer: Tokenizer) -> bool:
    """Whether tokenizer_config.json names tokens that tokenizer.json does not have; transformers adds them."""
    config = read_object(hf / TOKENIZER_CONFIG, DataError, default={})
    added = config.get("added_tokens_decoder")
    named = [*(added.values() if isinstance(added, dict) else ()), *(value for key, value in config.items() if key.endswith("_token"))]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or ()
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    texts = [token.get("content") if isinstance(token, dict) else token for token in named]
    return any(isinstance(text, str) and tokenizer.token_to_id(text) is None for text in texts)
