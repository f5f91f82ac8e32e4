"""Prompt files: which rows are used, what is said about the others, and in which order a run draws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rpp.config.schema import Data
from megatron_rpp.data.prompts import PromptStream, load_prompts
from megatron_rpp.errors import DataError

from .builders import byte_codec, byte_tokenizer, make_prompt

TOKENIZER = byte_tokenizer()
WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write lines (text, bytes, or a value to dump) to a .jsonl file."""

    def write(*rows: object) -> Path:
        lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
        path = tmp_path / "train.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def load(path: Path, vocab_size: int | None = None, **settings: object):
    cfg = Data(train=path, **settings)
    return load_prompts(cfg, byte_codec(TOKENIZER, vocab_size=vocab_size, template=cfg.template, system=cfg.system))


def good(number: int = 1) -> dict[str, str]:
    return {"prompt": f"{number}+1=", "answer": str(number + 1)}


def test_a_row_becomes_templated_tokens_plain_text_and_an_answer(write_rows: WriteRows) -> None:
    (prompt,) = load(write_rows({"prompt": "2+2=", "answer": "4", "kind": "sum"}), domain_key="kind").prompts
    assert TOKENIZER.decode(prompt.tokens) == "<user>2+2=<assistant>"
    assert (prompt.text, prompt.answer, prompt.domain) == ("2+2=", "4", "sum")


def test_the_system_message_comes_first_unless_the_row_brings_its_own(write_rows: WriteRows) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "q"}]
    prompts = load(write_rows({"prompt": "q", "answer": "a"}, {"prompt": own, "answer": "a"}), system="be brief").prompts
    assert [TOKENIZER.decode(prompt.tokens) for prompt in prompts] == [
        "<system>be brief<user>q<assistant>",
        "<system>mine<user>q<assistant>",
    ]
    assert [prompt.text for prompt in prompts] == ["q", "q"]


def test_without_a_template_the_text_itself_is_tokenised(write_rows: WriteRows) -> None:
    (prompt,) = load(write_rows(good()), template="none").prompts
    assert TOKENIZER.decode(prompt.tokens) == "1+1="


BAD_ROWS = [
    ("{'single': quotes}", "not JSON"),
    ('{"prompt": "q", "answer": NaN}', "not JSON: NaN is not a JSON number"),
    ("[" * 100_000, "not JSON"),
    (b'{"prompt": "\xff", "answer": "a"}', r"not UTF-8 \(byte 13 of the line\)"),
    ("[1, 2]", "a JSON list, expected an object"),
    ({"answer": "a"}, r"field 'prompt' is missing \(fields: answer\)"),
    ({"prompt": "q"}, "field 'answer' is missing"),
    ({"prompt": "q", "answer": None}, "field 'answer' is missing"),
    ({"prompt": 7, "answer": "a"}, "'prompt' is of type int, expected text"),
    ({"prompt": "q", "answer": True}, "'answer' is of type bool, expected text"),
    ({"prompt": "q", "answer": ["a"]}, "'answer' is of type list, expected text"),
    ({"prompt": " \n", "answer": "a"}, "'prompt' is empty"),
    ({"prompt": "q", "answer": ""}, "'answer' is empty"),
    ('{"prompt": "q", "answer": 1e999}', "'answer' is inf, which is not a finite number"),
    ('{"prompt": "q", "answer": -1e999}', "'answer' is -inf, which is not a finite number"),
    ('{"prompt": "\\ud800", "answer": "a"}', "'prompt' holds half of a surrogate pair"),
    ({"prompt": "x" * 100, "answer": "a"}, r"117 prompt tokens, more than data.max_prompt_tokens=64"),
    ({"prompt": [], "answer": "a"}, "empty list of messages"),
    ({"prompt": ["q"], "answer": "a"}, r"prompt\[0\] must be an object"),
    ({"prompt": [{"role": "user", "content": 3}], "answer": "a"}, r"'prompt\[0\].content' is of type int"),
    ({"prompt": [{"role": "user", "content": "q", "name": "Ada"}], "answer": "a"}, r"prompt\[0\] has a field 'name'; only"),
    ({"prompt": [{"role": "user", "content": None}], "answer": "a"}, r"prompt\[0\] has no 'content'"),
    ({"prompt": "x" * 100_000, "answer": "a"}, r"100000 characters, which is far more than data.max_prompt_tokens=64 allows"),
    ({"prompt": [{"role": "assistant", "content": "hi"}], "answer": "a"}, "last message of 'prompt' is the assistant's"),
    (
        {"prompt": [{"role": "tool", "content": "x"}, {"role": "user", "content": "q"}], "answer": "a"},
        "chat template refuses the messages: no tools",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_is_named_with_its_line_and_reason(write_rows: WriteRows, row: object, reason: str) -> None:
    path = write_rows(good(1), "", row, good(2))
    with pytest.raises(DataError, match=rf"1 of 3 rows cannot be used[\s\S]*train.jsonl:3: {'.*'}{reason}"):
        load(path, max_prompt_tokens=64)
    kept = load(path, max_prompt_tokens=64, on_bad_row="skip")
    assert [prompt.text for prompt in kept.prompts] == ["1+1=", "2+1="]
    assert [(bad.file, bad.line) for bad in kept.bad_rows] == [(str(path), 3)]


def test_a_duplicate_is_a_bad_row_that_names_the_first(write_rows: WriteRows) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:3: the same problem and answer as line 1"):
        load(write_rows(good(1), good(2), good(1)))


def test_the_same_problem_with_another_answer_is_another_prompt(write_rows: WriteRows) -> None:
    one, other = load(write_rows({"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": "2"})).prompts
    assert one.uid != other.uid


def test_only_the_first_bad_rows_are_shown_and_the_rest_counted(write_rows: WriteRows) -> None:
    with pytest.raises(DataError) as caught:
        load(write_rows(good(), *["nonsense"] * 13))
    message = str(caught.value)
    assert "13 of 14 rows cannot be used" in message
    assert "train.jsonl:11: " in message
    assert "train.jsonl:12: " not in message
    assert "and 3 more" in message
    assert "data.on_bad_row=skip" in message


def test_uids_depend_on_content_and_not_on_place_or_template(write_rows: WriteRows) -> None:
    first = {prompt.text: prompt.uid for prompt in load(write_rows(good(1), good(2))).prompts}
    again = {prompt.text: prompt.uid for prompt in load(write_rows(good(3), good(2), good(1)), template="none").prompts}
    assert first.items() < again.items()


def test_a_known_uid_never_changes(write_rows: WriteRows) -> None:
    """Seeds and ledgers of old runs are keyed by it."""
    (prompt,) = load(write_rows({"prompt": "q", "answer": "a"})).prompts
    assert prompt.uid == hashlib.blake2b(b'["q", "a", "default"]', digest_size=16).hexdigest() == "1c5ce1c5da3adeff61139708aa09092d"


def test_number_answers_are_written_as_numbers(write_rows: WriteRows) -> None:
    rows = [{"prompt": f"q{place}", "answer": answer} for place, answer in enumerate([27.0, 2.5, -3, 12345678901234567890, 10**400])]
    assert [prompt.answer for prompt in load(write_rows(*rows)).prompts] == ["27", "2.5", "-3", "12345678901234567890", "1" + "0" * 400]


def test_gsm8k_answers_are_what_follows_the_last_marker(write_rows: WriteRows) -> None:
    path = write_rows({"question": "q", "answer": "12 #### is\n#### 1,234 "}, {"question": "r", "answer": "no marker: 5"})
    with pytest.raises(DataError, match=r":2: 'answer' holds no text after '####' \(data.answer_after\)"):
        load(path, prompt_key="question", answer_after="####")
    (prompt,) = load(path, prompt_key="question", answer_after="####", on_bad_row="skip").prompts
    assert prompt.answer == "1,234"


def test_blank_lines_and_a_byte_order_mark_are_not_rows(write_rows: WriteRows) -> None:
    path = write_rows(b"\xef\xbb\xbf" + json.dumps(good(1)).encode(), "", "   ", good(2))
    assert len(load(path).prompts) == 2


@pytest.mark.parametrize("key", ["reward_model.ground_truth", "reward_model.truth.value"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_key_may_be_a_path_into_nested_fields(tmp_path: Path, key: str, suffix: str) -> None:
    rows = [{"prompt": f"q{n}", "reward_model": {"style": "rule", "ground_truth": f"{n}", "truth": {"value": f"{n}"}}} for n in range(3)]
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.answer for prompt in load(path, answer_key=key).prompts] == ["0", "1", "2"]
    missing = {"jsonl": "field 'reward_model.absent' is missing", "parquet": "column 'reward_model' has no field 'absent'"}
    with pytest.raises(DataError, match=missing[suffix]):
        load(path, answer_key="reward_model.absent")


def test_a_path_into_a_column_of_text_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["q"], "reward_model": ['{"ground_truth": "1"}']}), path)
    with pytest.raises(DataError, match=r"column 'reward_model' has no fields[\s\S]*got: string"):
        load(path, answer_key="reward_model.ground_truth")
    with pytest.raises(DataError, match=r"column 'a.b' is missing[\s\S]*got: prompt, reward_model"):
        load(path, answer_key="a.b")


def test_a_file_of_bad_rows_alone_says_why(write_rows: WriteRows) -> None:
    with pytest.raises(DataError, match=r"no usable row[\s\S]*train.jsonl:2: field 'answer' is missing"):
        load(write_rows({"prompt": "q"}, {"prompt": "r"}), on_bad_row="skip")


def test_a_key_with_a_dot_that_is_a_field_itself_is_that_field(write_rows: WriteRows) -> None:
    (prompt,) = load(write_rows({"prompt": "q", "a.b": "1", "a": {"b": "2"}}), answer_key="a.b").prompts
    assert prompt.answer == "1"


def test_fields_of_a_message_that_are_null_are_not_there(tmp_path: Path) -> None:
    """A table gives every message all columns that any message has."""
    messages = [{"role": "user", "content": "q", "name": None, "tool_calls": None}]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": [messages], "answer": ["1"]}), path)
    (prompt,) = load(path).prompts
    assert TOKENIZER.decode(prompt.tokens) == "<user>q<assistant>"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_answer_of_a_table_that_is_no_finite_number_is_a_bad_row(tmp_path: Path, value: float) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["q", "r"], "answer": [1.5, value]}), path)
    with pytest.raises(DataError, match=rf"train.parquet:2: 'answer' is {value}, which is not a finite number"):
        load(path)


def test_large_and_small_numbers_keep_the_value_that_was_written(write_rows: WriteRows) -> None:
    """As integers 1e23 would be 99999999999999991611392."""
    rows = [f'{{"prompt": "q{place}", "answer": {text}}}' for place, text in enumerate(["1e23", "1e-7", "-0.0", "100.0", "2.50"])]
    assert [prompt.answer for prompt in load(write_rows(*rows)).prompts] == ["1" + "0" * 23, "0.0000001", "0", "100", "2.5"]


def test_a_token_without_a_row_in_the_model_is_a_bad_row_that_names_it(write_rows: WriteRows) -> None:
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    path = write_rows(good(1), {"prompt": "say <new>", "answer": "1"})
    codec = byte_codec(tokenizer, vocab_size=rows)
    with pytest.raises(
        DataError, match=rf"train.jsonl:2: prompt token {rows} \('<new>', at position 10\) is not in the model, which has {rows} rows"
    ):
        load_prompts(Data(train=path), codec)
    assert len(load_prompts(Data(train=path, on_bad_row="skip"), codec).prompts) == 1
    assert len(load_prompts(Data(train=path), byte_codec(tokenizer)).prompts) == 2  # with a row for it all is well


def test_a_huge_row_is_not_encoded_as_a_whole(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = type(TOKENIZER).encode
    monkeypatch.setattr(type(TOKENIZER), "encode", lambda self, text, **rest: encoded.append(len(text)) or encode(self, text, **rest))
    with pytest.raises(DataError, match="10000000 characters"):
        load(write_rows({"prompt": "x" * 10_000_000, "answer": "a"}), max_prompt_tokens=64)
    assert 0 < sum(encoded) < 10_000


def test_a_prompt_knows_what_the_template_wrote_after_its_last_message(write_rows: WriteRows) -> None:
    """A message that reads like the template must not hide where the assistant's turn begins."""
    template = byte_tokenizer().chat_template.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
    path = write_rows({"prompt": "think>", "answer": "1"}, {"prompt": "<assistant><think>\n", "answer": "1"})
    prompts = load_prompts(Data(train=path), byte_codec(byte_tokenizer(chat_template=template))).prompts
    assert [prompt.end for prompt in prompts] == ["<assistant><think>\n"] * 2
    for turn in (
        "<assistant><think>{% if add_generation_prompt %}{% endif %}",
        "{% if add_generation_prompt %}<A><think>{% else %}<eos>{% endif %}",
    ):
        template = byte_tokenizer().chat_template.partition("{% if add_generation_prompt %}")[0] + turn
        prompts = load_prompts(Data(train=path), byte_codec(byte_tokenizer(chat_template=template))).prompts
        assert [prompt.end for prompt in prompts] == [turn.partition("{% if add")[0] or "<A><think>"] * 2
    plain = load(write_rows({"prompt": "A: <think>\n", "answer": "1"}, {"prompt": "Use <think> tags.", "answer": "1"}), template="none")
    assert [prompt.end for prompt in plain.prompts] == ["<think>", ""]


def test_parquet_rows_and_messages_are_read_like_jsonl(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1="}]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": [messages, messages, None], "answer": ["2", "2", "3"], "unused": [0, 1, 2]}), path)
    loaded = load(path, on_bad_row="skip")
    assert [TOKENIZER.decode(prompt.tokens) for prompt in loaded.prompts] == ["<user>1+1=<assistant>"]
    assert [(bad.line, bad.reason.split(" (")[0]) for bad in loaded.bad_rows] == [
        (2, "the same problem and answer as line 1"),
        (3, "field 'prompt' is missing"),
    ]


def test_files_that_cannot_be_read_are_data_errors(tmp_path: Path, write_rows: WriteRows) -> None:
    empty, broken, text = tmp_path / "empty.jsonl", tmp_path / "broken.parquet", tmp_path / "train.csv"
    empty.write_bytes(b"")
    broken.write_bytes(b"PAR1 this is not parquet")
    text.write_text("a,b")
    columns = tmp_path / "columns.parquet"
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), columns)
    cases = [
        (tmp_path / "absent.jsonl", "no such file"),
        (tmp_path, "are not read"),
        (text, "files of type '.csv' are not read"),
        (empty, "no usable row"),
        (broken, "does not read"),
        (columns, "column 'prompt' is missing"),
    ]
    for path, message in cases:
        with pytest.raises(DataError, match=message):
            load(path)
    with pytest.raises(DataError, match="no usable row"):
        load(write_rows("nonsense"), on_bad_row="skip")


PROMPTS = [make_prompt(number) for number in range(10)]


def uids(stream: PromptStream, count: int) -> list[str]:
    return [prompt.uid for prompt in stream.take(count)]


def test_each_epoch_draws_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(PROMPTS, seed=3)
    first, second = uids(stream, 10), uids(stream, 10)
    assert sorted(first) == sorted(second) == sorted(prompt.uid for prompt in PROMPTS)
    assert first != second


def test_the_seed_decides_the_order() -> None:
    assert uids(PromptStream(PROMPTS, 1), 10) == uids(PromptStream(PROMPTS, 1), 10)
    assert uids(PromptStream(PROMPTS, 1), 10) != uids(PromptStream(PROMPTS, 2), 10)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 9, 10])
def test_one_take_never_holds_a_prompt_twice_and_epochs_stay_whole(count: int) -> None:
    """A second copy in a step would get the same seeds, hence the same responses."""
    stream = PromptStream(PROMPTS, seed=5)
    drawn = []
    for _ in range(30):
        taken = uids(stream, count)
        assert len(set(taken)) == count
        drawn += taken
    for start in range(0, len(drawn) - 9, 10):
        assert len(set(drawn[start : start + 10])) == 10


@pytest.mark.parametrize("before", range(8))
def test_a_loaded_state_goes_on_exactly_where_it_was_saved(before: int) -> None:
    whole = PromptStream(PROMPTS, seed=5)
    for _ in range(before):
        whole.take(4)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptStream(PROMPTS, seed=5)
    resumed.load_state_dict(state)
    assert [uids(resumed, 4) for _ in range(9)] == [uids(whole, 4) for _ in range(9)]


def test_a_state_of_other_prompts_or_another_seed_is_refused() -> None:
    state = PromptStream(PROMPTS, seed=5).state_dict()
    for stream in (PromptStream(PROMPTS[:9], 5), PromptStream(PROMPTS[::-1], 5), PromptStream(PROMPTS, 6)):
        with pytest.raises(DataError, match="other prompts or another seed"):
            stream.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: odd}
            for name in ("epoch", "position")
            for odd in (None, -1, "1", 1.5, True, [], 10**9)
            if (name, odd) != ("epoch", 10**9)
        ),
        *({"held_back": odd} for odd in (None, 1, "x", [-1], [10], [1, 1], ["1"], [True], {})),
        *({"fingerprint": odd} for odd in (None, 3, [])),
    ],
)
def test_a_state_of_wrong_types_is_refused(change: dict[str, object]) -> None:
    stream = PromptStream(PROMPTS, seed=5)
    with pytest.raises(DataError, match="the saved position in the prompts is damaged"):
        stream.load_state_dict(stream.state_dict() | change)
    with pytest.raises(DataError, match="the saved position in the prompts is damaged"):
        stream.load_state_dict({})


def test_more_prompts_than_there_are_is_an_error_that_says_how_many() -> None:
    with pytest.raises(DataError, match=r"11 different prompts[\s\S]*1 to 10"):
        PromptStream(PROMPTS, 0).take(11)
    with pytest.raises(DataError, match="no prompt to draw from"):
        PromptStream([], 0)
