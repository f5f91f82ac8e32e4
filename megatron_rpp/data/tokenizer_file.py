"""What `rpp check` says about a tokenizer, from tokenizer.json alone: in a fraction of a second, without transformers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.data.codec import long_tokenizer_warning, vocab_size_of
from megatron_rpp.data.stop_tokens import missing_config_warning, read_stop_tokens
from megatron_rpp.data.template import load_error

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
    """Read model.hf/tokenizer.json. Raises: DataError, ConfigError for what would end the run at its start."""
    hf = cfg.model.hf
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return TokenizerPreview("unknown: the package tokenizers is not installed here")
    if not (hf / FILE).is_file():
        return TokenizerPreview(f"unknown: {hf} has no {FILE}")
    try:
        tokenizer = Tokenizer.from_file(str(hf / FILE))
    except Exception as error:  # it raises a bare Exception for a file that it does not understand
        raise load_error(hf, error) from error
    vocab_size = vocab_size_of(cfg)
    stop = read_stop_tokens(
        hf,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        vocab_size=vocab_size,
        more=cfg.rollout.stop_tokens,
    )
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    found = (long_tokenizer_warning(num_tokens, vocab_size), missing_config_warning(hf, stop))
    text = stop.describe(lambda token: tokenizer.decode([token], skip_special_tokens=False))
    return TokenizerPreview(text, tuple(warning for warning in found if warning is not None))
