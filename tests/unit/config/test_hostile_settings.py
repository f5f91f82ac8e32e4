"""Settings that nobody writes by mistake: each is one message with file and line, at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_rpp.config.load import MAX_FILES, load
from megatron_rpp.config.load_yaml import MAX_BYTES, MAX_DEPTH, parse
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError
from tests.unit.config.conftest import Write
from tests.unit.odd_files import ODD_FILES, Make, make_sparse

REQUIRED = "model: {hf: m}\ndata: {train: t.jsonl}\n"
TOO_DEEP = f"not valid YAML: nested more than {MAX_DEPTH} levels deep"

HOSTILE = {
    "control character": ("a: \x01", "x.yaml:3: YAML does not allow this character", "got: U+0001"),
    "NUL": ("\na: \0", "x.yaml:4: YAML does not allow this character", "got: U+0000"),
    "C1": ("a: '\x9b'", "x.yaml:3: YAML does not allow this character", "got: U+009B"),
    "lists": ("a: " + "[" * 5000, f"x.yaml:3: {TOO_DEEP}", ""),
    "sections": ("a: " + "{a: " * 2000 + "1" + "}" * 2000, f"x.yaml:3: {TOO_DEEP}", ""),
    "block lists": ("- " * 900 + "1", "x.yaml:3: not valid YAML", ""),
    "indents": ("\n".join(" " * depth + "a:" for depth in range(300)), f"x.yaml:18: {TOO_DEEP}", ""),
    "!!bool": ("a: !!bool maybe", "x.yaml:3: a has the tag !!bool and another value", "got: 'maybe'"),
    "!!bool yes": ("a: !!bool yes", "x.yaml:3: a has the tag !!bool and another value", "got: 'yes'"),
    "!!int": ("a:\n  b: !!int x", "x.yaml:4: a.b has the tag !!int and another value", "got: 'x'"),
    "!!int of nothing": ("a: !!int ''", "x.yaml:3: a has the tag !!int and another value", "got: ''"),
    "!!float of nothing": ("a: [1, !!float '']", "x.yaml:3: a.1 has the tag !!float and another value", "got: ''"),
    "!!null": ("a: !!null x", "x.yaml:3: a has the tag !!null and another value", "got: 'x'"),
    "!!seq": ("a: !!seq x", "x.yaml:3: not valid YAML: expected a sequence node, but found scalar", ""),
    "!!map": ("a: !!map [x]", "x.yaml:3: not valid YAML: expected a mapping node, but found sequence", ""),
    "!!float of a list": ("a: !!float [1]", "x.yaml:3: not valid YAML: expected a scalar node, but found sequence", ""),
    "!!binary": ("a: !!binary '%'", "x.yaml:3: a has the tag tag:yaml.org,2002:binary", ""),
    "!!python": ("a: !!python/object/apply:os.system [id]", "x.yaml:3: a has the tag tag:yaml.org,2002:python/object/apply", ""),
    "digits": ("optim: {lr: " + "9" * 5000 + "}", "x.yaml:3: optim.lr has 5000 digits", ""),
    "large number": ("parallel: {tp: " + "9" * 40 + "}", "x.yaml:3  parallel.tp: expected a number from -9223372036854775808 to", ""),
    "large number in a list": (
        "algo: {reward_clip: [0, -9223372036854775809]}",
        "x.yaml:3  algo.reward_clip.1: expected a number from",
        "",
    ),
    "surrogate": ('algo: {estimator: "\\ud800"}', 'x.yaml:3  algo.estimator: expected text in UTF-8, got "\\ud800"', ""),
    "surrogate in a name": ('optim: {"\\ud800": 1}', "x.yaml:3  optim.\\ud800: expected text in UTF-8", ""),
    "escape in a name": ('optim: {"l\\e[31mr": 1}', "x.yaml:3  optim.l\\u001b[31mr: unknown setting", ""),
    "newline in a name": ('optim: {"l\\nx.yaml: every setting holds": 1}', "\n    x.yaml: every setting holds: unknown setting", ""),
    "extends": ('extends: "a\\0b"', "a\\u0000b: cannot read the settings: no file can have this name", ""),
    "extends a device": ("extends: /dev/zero", "/dev/zero: cannot read the settings: a device, not a regular file", ""),
    "extends a long name": ("extends: " + "a" * 5000, "cannot read the settings: File name too long", ""),
}


@pytest.mark.parametrize(("text", "message", "got"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_one_message_with_its_line(write: Write, text: str, message: str, got: str) -> None:
    path = write("x.yaml", REQUIRED + text + "\n")
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert got in str(caught.value)
    assert time.monotonic() - start < 5


def test_levels_up_to_the_limit_are_read() -> None:
    inner = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse(inner, "text").value is not None
    with pytest.raises(ConfigError, match="levels deep"):
        parse(f"[{inner}]", "text")


NOT_FILES = ODD_FILES | {"a file of 1 TiB": (make_sparse, f"at most {MAX_BYTES:,} are read")}


@pytest.mark.parametrize(("make", "reason"), NOT_FILES.values(), ids=NOT_FILES)
def test_only_a_regular_file_of_a_stated_size_is_read(tmp_path: Path, write: Write, make: Make, reason: str) -> None:
    make(tmp_path / "odd.yaml")
    path = write("run.yaml", REQUIRED + "extends: odd.yaml\n")
    for named in (tmp_path / "odd.yaml", path):
        with pytest.raises(ConfigError) as caught:
            load(named)
        assert "odd.yaml: cannot read the settings: " in str(caught.value)
        assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "\udcff.yaml", "a" * 300])
def test_a_name_that_is_no_files_is_one_message(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings"):
        load(tmp_path / name)


def test_files_that_name_each_other_twice_or_in_a_long_row_are_refused_at_once(write: Write) -> None:
    for depth in range(40):
        write(f"twice-{depth}.yaml", f"extends: [twice-{depth + 1}.yaml, twice-{depth + 1}.yaml]\n")
        write(f"row-{depth}.yaml", f"extends: row-{depth + 1}.yaml\n")
    for kind in ("twice", "row"):
        write(f"{kind}-40.yaml", REQUIRED)
        with pytest.raises(ConfigError, match=f"`extends` leads to too many files\n  expected: at most {MAX_FILES}"):
            load(write("run.yaml", f"extends: {kind}-0.yaml\n"))
    write("row-20.yaml", REQUIRED)
    assert load(write("run.yaml", "extends: row-0.yaml\n")).model.hf.name == "m"


def test_of_thousands_of_mistakes_the_first_are_explained(write: Write) -> None:
    path = write("run.yaml", REQUIRED + "optim:\n" + "".join(f"  a{number}: 1\n" for number in range(9000)))
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: more than 50 settings are wrong; these are some of them"
    assert len(lines) == 51
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1\x01", "command line, optim.lr:1: YAML does not allow this character"),
        ("optim.lr=" + "[" * 5000, f"command line, optim.lr:1: {TOO_DEEP}"),
        ("optim.lr=!!bool maybe", "command line, optim.lr:1: the value has the tag !!bool and another value"),
        ("run.dir=\udcff", "command line, run.dir:1: YAML does not allow this character"),
        ("optim.\udcff=1", "command line  optim.\\udcff: expected text in UTF-8"),
        ("optim.l\x1b[31mr=1", "command line  optim.l\\u001b[31mr: unknown setting"),
        (".".join("a" * 2000) + "=1", "command line: cannot read an override"),
    ],
)
def test_a_hostile_override_is_one_message(write: Write, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write("run.yaml", REQUIRED), [override])
    assert message in str(caught.value)


def test_paths_that_are_no_files_are_named_before_a_run_starts(project: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "dir.jsonl").mkdir()
    cases = {
        f"data.eval={tmp_path}/pipe.jsonl": "data.eval: a named pipe, not a regular file: ",
        f"data.train={tmp_path}/zero.jsonl": "data.train: a device, not a regular file: ",
        f"data.train={tmp_path}/dir.jsonl": "data.train: a directory, not a regular file: ",
        'data.train="a\\0b.jsonl"': "data.train: no file can have this name: ",
        f"data.train={'a' * 300}.jsonl": "data.train: File name too long: ",
        'model.hf="a\\0b"': "a\\u0000b/config.json: cannot read the file\n      got: no file can have this name",
        'model.megatron_checkpoint="a\\0b"': "model.megatron_checkpoint: no file can have this name: ",
        f"model.megatron_checkpoint={project}": "model.megatron_checkpoint: a file, not a directory: ",
        'run.dir="a\\0b"': "run.dir: no file can have this name: ",
        f"run.dir={'a' * 300}": "run.dir: File name too long: ",
        f"run.dir={project}": "run.dir: a file, not a directory: ",
        f"run.dir={project}/below": "run.dir: Not a directory: ",
        f"sft.out={tmp_path}/pipe.jsonl": "sft.out: a named pipe, not a directory: ",
    }
    for override, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            validate(load(project, [override]))
        assert message in str(caught.value), override
