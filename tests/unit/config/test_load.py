"""Reading settings: the YAML dialect, files on files, overrides, paths, and messages that say all that is wrong at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.config import load_yaml
from megatron_rpp.config.load import dump, load
from megatron_rpp.config.schema import Config, Data, Model, Rollout
from megatron_rpp.errors import ConfigError
from tests.unit.config.conftest import Write

REQUIRED = "model: {hf: m}\ndata: {train: t.jsonl}\n"


def yaml(text: str) -> object:
    return load_yaml.parse(text, "text").value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-6", 1e-6), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0), (".inf", float("inf")), ("3", 3), ("-0", 0)],
        *[("true", True), ("false", False), ("null", None), ("~", None), ("", None)],
        *[
            ("yes", "yes"),
            ("no", "no"),
            ("on", "on"),
            ("off", "off"),
            ("True", "True"),
            ("010", "010"),
            ("0x10", "0x10"),
            ("1_000", "1_000"),
        ],
        *[("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e5", "e5"), ("=", "="), ("<<", "<<"), ("'1'", "1")],
    ],
)
def test_a_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    parsed = yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3), max_leaves=10
)


@given(trees)
def test_what_is_written_is_read_back(tree: object) -> None:
    keyed = {"a": tree}
    back = yaml(load_yaml.write(keyed))
    assert back == keyed
    assert json.dumps(back) == json.dumps(keyed)  # 1 is not 1.0 and True is not 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "text:3: a is given twice\n  expected: once, as at text:1"),
        ("a:\n  b: {c: 1, c: 2}", "text:2: a.b.c is given twice"),
        ("a: [1\nb: 2", "text:2: not valid YAML"),
        ("a: &x [1]\nb: *x", "text:1: b is an alias of another value"),
        ("a: &x {b: *x}", "a.b is an alias of another value"),
        ("a: !!int hello", "text:1: a has the tag !!int and another value\n  got: 'hello'"),
        ("a: !!python/object:os.system x", "text:1: a has the tag"),
        ("a: !!timestamp 2024-01-01", "text:1: a has the tag"),
        ("a: !secret x", "text:1: a has the tag"),
        ("1: x", "text:1: a key must be a word"),
        ("true: x", "text:1: a key must be a word"),
        ("? [a]\n: x", "text:1: a key must be a word"),
        ("\tb: 1", "text:1: not valid YAML"),
        ("a: 1\n---\nb: 2", "text:2: not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml.parse(text, "text")
    assert message in str(caught.value)


def test_every_value_reaches_its_field_with_its_type(write: Write) -> None:
    path = write(
        "run.yaml", REQUIRED + "optim: {lr: 1}\nalgo: {reward_clip: [0, 1.5]}\nrollout: {sglang: {a: 1, b: 1.0, c: true, d: x, e: null}}\n"
    )
    cfg = load(path)
    assert cfg.optim.lr == 1.0
    assert type(cfg.optim.lr) is float
    assert cfg.algo.reward_clip == (0.0, 1.5)
    assert [(type(value), value) for value in cfg.rollout.sglang.values()] == [
        (int, 1),
        (float, 1.0),
        (bool, True),
        (str, "x"),
        (type(None), None),
    ]


def test_dump_and_load_give_the_same_configuration(write: Write, tmp_path: Path) -> None:
    path = write("run.yaml", REQUIRED + "rollout: {sglang: {name: 'no', number: '1e-6', size: 3, on: true}}\nalgo: {reward_clip: null}\n")
    cfg = load(path, ["run.dir=here", "optim.lr=1e-7", "data.system='a: \"b\"\n#c'", "sft.out=o"])
    assert load(write("elsewhere/config.yaml", dump(cfg))) == cfg


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
        max_size=4,
    )
)
def test_any_engine_option_survives_dump_and_load(tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]) -> None:
    cfg = Config(model=Model(hf=Path("/m")), data=Data(train=Path("/t")), rollout=Rollout(sglang=options))
    cfg = replace(cfg, run=replace(cfg.run, dir=Path("/r")))
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(cfg), encoding="utf-8")
    assert load(path) == cfg


def test_all_mistakes_are_reported_at_once_each_with_its_line(write: Write) -> None:
    path = write(
        "run.yaml",
        "data: {eval: 3}\nparallel: {tp: '4', dp: true, pp: 1.0}\nrun: 3\n"
        "algo:\n  clip_lo: 0.2\n  lr: 1\n  estimator: ppo\n  reward_clip: [1]\nrollout: {engines: many, sglang: {a: [1]}}\nevall: {}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load(path, ["optim.lrr=1"])
    assert str(caught.value).splitlines() == [
        f"{path}: 15 settings are wrong",
        "  model.hf: required, and not set",
        f"  {path}:1  data.train: required, and not set",
        f"  {path}:1  data.eval: expected a path or null, got 3",
        f'  {path}:2  parallel.tp: expected a whole number, got "4"',
        f"  {path}:2  parallel.pp: expected a whole number, got 1.0",
        f"  {path}:2  parallel.dp: expected a whole number, got true",
        f"  {path}:3  run: expected a section with settings of its own, got 3",
        f"  {path}:5  algo.clip_lo: unknown setting; did you mean algo.clip_low?",
        f"  {path}:6  algo.lr: unknown setting; did you mean optim.lr?",
        f"  {path}:7  algo.estimator: expected 'reinforce_pp', 'reinforce_pp_baseline', 'rloo', 'remax', 'grpo', 'dr_grpo' or 'gae', "
        'got "ppo"',
        f"  {path}:8  algo.reward_clip: expected 2 values, got [1]",
        f'  {path}:9  rollout.engines: expected a whole number or null, got "many"',
        f"  {path}:9  rollout.sglang.a: expected a word, a number, true, false or null, got [1]",
        f"  {path}:10  evall: unknown setting; did you mean eval?",
        "  command line  optim.lrr: unknown setting; did you mean optim.lr?",
    ]


def test_a_later_file_and_then_the_command_line_win(write: Write) -> None:
    write("base.yaml", REQUIRED + "optim: {lr: 1e-3, beta1: 0.5}\nalgo: {reward_clip: [0, 1]}\nrollout: {sglang: {a: 1, b: 2}}\n")
    write("more.yaml", "optim: {lr: 2e-3}\nrollout: {sglang: {b: 3}}\n")
    path = write("run.yaml", "extends: [base.yaml, more.yaml]\noptim: {eps: 1e-5}\nalgo: {reward_clip: [2, 3]}\nrollout:\n")
    cfg = load(path, ["optim.eps=1e-4", "optim.eps=1e-3", "rollout.sglang.c=x=y"])
    assert (cfg.optim.lr, cfg.optim.beta1, cfg.optim.eps) == (2e-3, 0.5, 1e-3)
    assert cfg.algo.reward_clip == (2.0, 3.0)
    assert cfg.rollout.sglang == {"a": 1, "b": 3, "c": "x=y"}


def test_a_mistake_in_a_base_is_reported_there(write: Write) -> None:
    base = write("base.yaml", REQUIRED + "optim:\n  lr: fast\n  beta1: fast\n")
    path = write("deep/run.yaml", "extends: ../base.yaml\noptim: {beta1: slow}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, ["optim.beta2=no"])
    assert f'{path.parent / ".." / "base.yaml"}:4  optim.lr: expected a number, got "fast"' in str(caught.value)
    assert f'{path}:2  optim.beta1: expected a number, got "slow"' in str(caught.value)
    assert 'command line  optim.beta2: expected a number, got "no"' in str(caught.value)
    assert base.exists()


def test_a_section_given_on_the_command_line_replaces_the_one_in_the_file_and_is_blamed_there(write: Write) -> None:
    path = write("run.yaml", REQUIRED + "rollout:\n  sglang:\n    a: 1\n    b: 2\n")
    assert load(path, ["rollout.sglang={b: 3}"]).rollout.sglang == {"b": 3}
    with pytest.raises(ConfigError, match=r"\n  command line  rollout\.sglang\.a: expected a word"):
        load(path, ["rollout.sglang={a: [1]}"])


def test_files_that_extend_each_other_are_refused(write: Write) -> None:
    path = write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="goes round in a circle"):
        load(path)


def test_inputs_are_relative_to_their_file_and_outputs_to_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write("base/base.yaml", "model: {hf: ../models/m}\nsft: {train: s.jsonl}\n")
    path = write(
        "runs/run.yaml", "extends: ../base/base.yaml\ndata: {train: t.jsonl, eval: /abs/e.jsonl}\nrun: {dir: out}\nsft: {out: tuned}\n"
    )
    cfg = load(path, ["model.ref=r"])
    assert cfg.model.hf == tmp_path / "models" / "m"
    assert cfg.model.ref == tmp_path / "cwd" / "r"
    assert cfg.data == Data(train=tmp_path / "runs" / "t.jsonl", eval=Path("/abs/e.jsonl"))
    assert cfg.run.dir == tmp_path / "cwd" / "out"
    assert (cfg.sft.train, cfg.sft.out) == (tmp_path / "base" / "s.jsonl", tmp_path / "cwd" / "tuned")


def test_a_default_output_is_absolute_too(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(write("run.yaml", REQUIRED)).run.dir == tmp_path / "runs" / "default"


@pytest.mark.parametrize("override", ["optim.lr", "=1", "optim=1", "optim..lr=1", ".lr=1", "optim.=1", ""])
def test_an_override_that_cannot_be_read_is_refused(write: Write, override: str) -> None:
    with pytest.raises(ConfigError, match="cannot read an override"):
        load(write("run.yaml", REQUIRED), [override])


def test_an_override_below_a_value_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="lr has no settings of its own"):
        load(write("run.yaml", REQUIRED + "optim: {lr: 1}\n"), ["optim.lr.x=1"])


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "must be sections"), ("hello", "must be sections"), ("extends: 3\n", "must be a file name")]
)
def test_a_file_that_is_no_settings_is_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write("run.yaml", text))


def test_a_file_that_cannot_be_read_is_an_error_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the settings: no such file"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="a directory, not a regular file"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load(tmp_path / "bytes.yaml")


def test_reading_settings_does_not_import_torch() -> None:
    code = "import sys, megatron_rpp.config.load, megatron_rpp.config.validate; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("setting", ["correction.weight_clip", "correction.reject_outside", "algo.reward_clip"])
@pytest.mark.parametrize("value", ["[0, 1, 2]", "[]", "[0]", "[0, 1, 2, 3]"])
def test_a_pair_of_another_length_is_told_in_our_words(write: Write, setting: str, value: str) -> None:
    section, name = setting.split(".")
    path = write("run.yaml", REQUIRED + f"{section}: {{{name}: {value}}}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines()[1:] == [f"  {path}:{REQUIRED.count(chr(10)) + 1}  {setting}: expected 2 values, got {value}"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5", "rollout.stop_tokens: expected a list, got 5"),
        ("[1.5]", "rollout.stop_tokens.0: expected a token id, or the text of a token, got 1.5"),
        ("[7, true]", "rollout.stop_tokens.1: expected a token id, or the text of a token, got true"),
    ],
)
def test_stop_tokens_of_another_type_are_told_in_our_words(write: Write, value: str, message: str) -> None:
    path = write("run.yaml", "model: {hf: m}\ndata: {train: t.jsonl}\n")
    assert load(path, ["rollout.stop_tokens=[7, '<|im_end|>']"]).rollout.stop_tokens == (7, "<|im_end|>")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(path, [f"rollout.stop_tokens={value}"])
