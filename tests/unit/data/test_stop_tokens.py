"""What ends a response: the union of everything that names an end token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.schema import Config, Data, Model, Rollout
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.stop_tokens import StopTokens, read_stop_tokens
from megatron_rpp.data.tokenizer_file import preview_tokenizer
from megatron_rpp.errors import ConfigError, DataError

from .builders import byte_tokenizer

ROWS = 300
SHAPE = {
    **{"model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": ROWS},
}


def make_model(folder: Path, *, config: Any = None, generation: Any = None, tokenizer: str | None = None, rows: int = ROWS) -> Path:
    """A directory whose files name these end tokens; None leaves the entry out. Tokens: 256 bytes, <end>, <turn>, <pad>."""
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<end>", "<turn>", "<pad>"]})
    if tokenizer is not None:
        made.eos_token = tokenizer
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": rows} | ({} if config is None else {"eos_token_id": config})))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def settings(folder: Path, *stop_tokens: int | str) -> Config:
    train = folder / "train.jsonl"
    train.touch()
    return Config(model=Model(hf=folder), data=Data(train=train), rollout=Rollout(stop_tokens=stop_tokens))


def stop_of(folder: Path, *stop_tokens: int | str) -> StopTokens:
    return Codec.open(settings(folder, *stop_tokens)).stop


END, TURN, PAD = 256, 257, 258
SOURCES = [
    (dict(config=END, tokenizer="<end>"), (END,), END),
    (dict(config=END, tokenizer="<turn>"), (END, TURN), TURN),  # a base model with a chat tokenizer
    (dict(config=END, generation=TURN), (END, TURN), TURN),
    (dict(config=END, generation=[TURN, PAD], tokenizer="<end>"), (END, TURN, PAD), END),
    (dict(config=[END, TURN]), (END, TURN), END),
    (dict(generation=[PAD]), (PAD,), PAD),
    (dict(tokenizer="<turn>"), (TURN,), TURN),
    (dict(config=ROWS + 7, tokenizer="<end>"), (END,), END),  # a token without a row can never be sampled
]


@pytest.mark.parametrize(("named", "ids", "end"), SOURCES)
def test_stop_tokens_are_the_union_of_all_files_and_the_tokenizer_comes_first(
    tmp_path: Path, named: dict[str, Any], ids: tuple[int, ...], end: int
) -> None:
    stop = stop_of(make_model(tmp_path, **named))
    assert (stop.ids, stop.end) == (ids, end)


@pytest.mark.parametrize("named", [named for named, _, _ in SOURCES])
@pytest.mark.parametrize("more", [(), (PAD,), ("<pad>", 10)])
def test_the_check_names_the_same_tokens_as_the_run(tmp_path: Path, named: dict[str, Any], more: tuple[int | str, ...]) -> None:
    """Two ways to read a tokenizer: transformers, and tokenizer.json alone."""
    cfg = settings(make_model(tmp_path, **named), *more)
    codec = Codec.open(cfg)
    assert preview_tokenizer(cfg).stop_tokens == codec.stop.describe(codec.text_of)


def test_each_token_says_who_names_it(tmp_path: Path) -> None:
    cfg = settings(make_model(tmp_path, config=END, generation=[END, TURN], tokenizer="<end>"), "<pad>", TURN)
    codec = Codec.open(cfg)
    assert codec.stop.describe(codec.text_of) == (
        "256 '<end>' (tokenizer_config.json, generation_config.json, config.json), "
        "257 '<turn>' (generation_config.json, rollout.stop_tokens), 258 '<pad>' (rollout.stop_tokens)"
    )


def test_nothing_that_ends_a_response_is_an_error_that_says_how_to_set_it(tmp_path: Path) -> None:
    make_model(tmp_path)
    for read in (stop_of, lambda folder: preview_tokenizer(settings(folder))):
        with pytest.raises(DataError, match=r"no token ends a response[\s\S]*got: none[\s\S]*rollout.stop_tokens"):
            read(tmp_path)
    assert stop_of(tmp_path, "<turn>").ids == (TURN,)


def test_end_tokens_without_a_row_are_named_when_there_is_no_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"an end token with an id below 256[\s\S]*'<end>' in tokenizer_config.json, 400 in config.json"):
        stop_of(make_model(tmp_path, config=400, tokenizer="<end>", rows=256))


WRONG = [
    (("two tokens",), r"'two tokens' is not a single token of this tokenizer[\s\S]*got: 10 tokens"),
    (("",), "'' is not a single token"),
    ((ROWS,), rf"token {ROWS} is not in the model's vocabulary[\s\S]*an id from 0 to {ROWS - 1}"),
    ((-1,), "token -1 is not in the model's vocabulary"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_a_stop_token_of_the_user_must_be_one_token_of_the_model(tmp_path: Path, more: tuple[int | str, ...], message: str) -> None:
    folder = make_model(tmp_path, config=END)
    with pytest.raises(ConfigError, match=message):
        stop_of(folder, *more)
    with pytest.raises(ConfigError, match=message):
        preview_tokenizer(settings(folder, *more))


@pytest.mark.parametrize("value", ["<end>", [[1]], 1.5, True, {"id": 1}])
def test_an_end_token_that_is_no_id_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id: the end token is not a token id"):
        stop_of(make_model(tmp_path, config=END, generation=value))


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_file_that_does_not_read_is_one_error(tmp_path: Path, text: str) -> None:
    folder = make_model(tmp_path, config=END)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(DataError, match=r"generation_config.json: (cannot read the file as JSON|the file does not hold)"):
        stop_of(folder)


def test_a_missing_tokenizer_config_does_not_change_the_end_token_in_silence(tmp_path: Path) -> None:
    """The tokenizer's class would supply an end token of its own."""
    folder = make_model(tmp_path, config=TURN, tokenizer="<end>")
    assert Codec.open(settings(folder)).warnings == ()
    (folder / "chat_template.jinja").write_text(byte_tokenizer().chat_template)
    (folder / "tokenizer_config.json").unlink()
    assert read_stop_tokens(folder, lambda text: [END], vocab_size=ROWS).ids == (TURN,)
    for warnings in (Codec.open(settings(folder)).warnings, preview_tokenizer(settings(folder)).warnings):
        assert warnings == (f"{folder} has no tokenizer_config.json: the tokenizer names no end token; stop tokens: 257 (config.json)",)


@pytest.mark.parametrize("entry", [{}, {"eos_token": None}])
def test_the_end_token_of_a_tokenizers_class_is_not_used(tmp_path: Path, entry: dict[str, None]) -> None:
    """Qwen2Tokenizer has <|endoftext|> unless tokenizer_config.json says otherwise."""
    folder = make_model(tmp_path, config=TURN)
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<turn>"]})
    made.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    raw.pop("eos_token", None)
    path.write_text(json.dumps(raw | entry))
    assert Codec.open(settings(folder)).tokenizer.eos_token in ("<|endoftext|>", None)
    assert stop_of(folder).ids == (TURN,)


def test_the_older_file_of_special_tokens_counts_where_the_newer_names_none(tmp_path: Path) -> None:
    folder = make_model(tmp_path, config=TURN)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<pad>", "lstrip": False}}))
    assert stop_of(folder).describe(str) == "258 '258' (special_tokens_map.json), 257 '257' (config.json)"


def test_a_tokenizer_longer_than_the_model_is_one_warning_with_both_sizes(tmp_path: Path) -> None:
    cfg = settings(make_model(tmp_path, config=5, rows=257))
    expected = ("the tokenizer has 259 tokens and the model has 257 rows: texts with token ids of 257 or more are refused",)
    assert Codec.open(cfg).warnings == preview_tokenizer(cfg).warnings == expected


def test_the_smallest_embedding_counts(tmp_path: Path) -> None:
    from dataclasses import replace

    cfg = settings(make_model(tmp_path / "policy", config=5))
    other = make_model(tmp_path / "critic", config=5, rows=258)
    assert Codec.open(cfg).vocab_size == ROWS
    paid = replace(cfg.algo, kl_loss_coef=0.1)  # a reference that nothing looks at is not read
    assert Codec.open(replace(cfg, model=replace(cfg.model, ref=other), algo=paid)).vocab_size == 258
    critic = replace(cfg, critic=replace(cfg.critic, hf=other))
    assert Codec.open(critic).vocab_size == ROWS  # no critic without estimator gae
    assert Codec.open(replace(critic, algo=replace(cfg.algo, estimator="gae")), policy_only=True).vocab_size == ROWS
    absent = replace(cfg, model=replace(cfg.model, ref=tmp_path / "absent"), algo=paid)
    assert Codec.open(absent, policy_only=True).vocab_size == ROWS  # rpp sft may be about to make it
    assert Codec.open(replace(critic, algo=replace(cfg.algo, estimator="gae"))).vocab_size == 258


def test_a_named_end_token_that_is_no_token_of_the_model_is_a_warning(tmp_path: Path) -> None:
    folder = make_model(tmp_path, config=END, generation=ROWS + 7, tokenizer="<end>")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "two tokens"}))
    stop = read_stop_tokens(folder, byte_tokenizer().encode, vocab_size=ROWS)
    assert stop.ids == (END,)
    assert stop.warnings == (
        f"the end token 'two tokens' of {path} is not a token of the model: no response ends with it",
        f"the end token {ROWS + 7} of {folder / 'generation_config.json'} is not a token of the model: no response ends with it",
    )


@pytest.mark.parametrize("key", ["eos_token", "added_tokens_decoder", "extra_special_tokens"])
def test_the_check_knows_tokens_that_only_tokenizer_config_adds(tmp_path: Path, key: str) -> None:
    folder = make_model(tmp_path, config=END)
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}
    if key == "added_tokens_decoder":
        raw[key] = {"270": {"content": "<|im_end|>", "special": True}}
    elif key == "extra_special_tokens":
        raw[key] = ["<|im_end|>"]
    path.write_text(json.dumps(raw))
    cfg = settings(folder)
    codec = Codec.open(cfg)
    assert codec.text_of(codec.stop.end) == "<|im_end|>"
    assert preview_tokenizer(cfg).stop_tokens == codec.stop.describe(codec.text_of)


def test_a_check_without_a_tokenizer_says_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    assert preview_tokenizer(settings(tmp_path)).stop_tokens == f"unknown: {tmp_path} has no tokenizer.json"


def test_a_broken_tokenizer_fails_the_check_with_the_words_of_the_run(tmp_path: Path) -> None:
    folder = make_model(tmp_path, config=END)
    (folder / "tokenizer.json").write_text('{"version": "9.0"}')
    for read in (stop_of, lambda folder: preview_tokenizer(settings(folder))):
        with pytest.raises(DataError, match="the tokenizer does not load"):
            read(folder)
