"""Files that tools/check_fixtures.py cannot use: one line each, never a traceback; and the golden file with one thing wrong, in every
place of it: refused, or a failure, and never a pass."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.dist.fixture_tool import Capture, imported, refused, write

Place = tuple[str | int, ...]
Change = tuple[str, Place, Any]  # what was done, where, and the file that came of it

# What may be left out without another meaning: texts, what other conventions make of the inputs, and inputs that say their default.
DEFAULTS = {"gamma": 1.0, "beta": 0.0, "beta_in_reward": 0.0, "k2_loss_coef": 0.0, "lam": 1.0, "eps": 1e-6, "reject_mode": "mask"}
DEFAULTS |= {"weight_clip": [0.0, 2.0], "group": [0, 0, 0, 0], "reward_clip": [-10.0, 10.0]}  # the last holds no reward of its file
STATEMENTS = ("per_token_loss", "ratio")  # accepted with one value only
WRONG = (None, "moon", {"moon": 1}, [], math.nan, True)


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


SOUND = {
    "id": "gae-z",
    "estimator": "gae",
    "inputs": {"values": [[0.5]], "rewards": [1], "lam": 1, "lam_critic": 0},
    "expected": {"lam": []},
}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"values": [[0.5]], "lam_crit": 1}, "fixtures[0].inputs: unknown name 'lam_crit'; expected: values,"),
        ({"rewards": [1]}, "fixtures[0].inputs: values is missing; expected: values,"),
        ({"values": [[0.5]], "lam": "1"}, "fixtures[0].inputs.lam: wrong value; expected: a number in [0, 1]; got: '1'"),
        ({"values": [[0.5]], "lam": True}, "fixtures[0].inputs.lam: wrong value; expected: a number in [0, 1]; got: True"),
        ({"values": [[0.5]], "lam_critic": 1.5}, "fixtures[0].inputs.lam_critic: wrong value; expected: a number in [0, 1]; got: 1.5"),
        (
            {"values": [[0.5]], "lam": 1, "alpha": 1},
            "fixtures[0].inputs: one input would be ignored; expected: one of them; got: lam and alpha",
        ),
        ({"values": [[math.nan]]}, "fixtures[0].inputs.values[0][0]: wrong value; expected: a finite number; got: nan"),
        ({"values": [[10**400]]}, "fixtures[0].inputs.values[0][0]: wrong value; expected: a finite number; got: 1000"),
        ({"values": [0.5]}, "fixtures[0].inputs.values[0]: wrong type; expected: a list of lists, each entry a finite number; got: 0.5"),
        ({"values": [[0.5]], "mask": [[2]]}, "fixtures[0].inputs.mask[0][0]: wrong value; expected: 0, 1, true or false; got: 2"),
        ({"values": [[0.5], [1]], "rewards": [1]}, "fixtures[0].inputs.rewards: wrong length; expected: one entry for each response"),
        ({"values": [[0.5, 1]], "mask": [[1]]}, "fixtures[0].inputs.mask[0]: wrong length; expected: 2 tokens, as values[0] has; got: 1"),
        ({"values": []}, "fixtures[0].inputs.values: wrong length; expected: at least one entry; got: 0"),
    ],
)
def test_inputs_that_the_tool_does_not_know_are_refused(
    tmp_path: Path, tool: ModuleType, capsys: Capture, inputs: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "strange.json", [SOUND | {"inputs": inputs}])
    assert f"error: {path}: {message}" in refused(path, tool, capsys)


@pytest.mark.parametrize(
    ("estimator", "inputs", "message"),
    [
        ("kl", {"moon": "full"}, "no inputs that this estimator knows; expected: theta, pi_ref; or coef,"),
        ("overlong", {"correct": [1], "truncated": [1], "coef": 0, "factor": 1}, "a coefficient is missing or given twice"),
        ("overlong", {"lengths": [1], "L_max": 4, "cache": 4}, "cache: wrong value; expected: below L_max 4; got: 4"),
        ("dist_whiten", {"rank0": [[1]], "rank2": [[1]]}, "ranks are missing"),
        ("aggregate", {"rank0_sum": 1, "rank0_tokens": 1, "rank1_sum": 1}, "ranks are missing"),
        ("dr_grpo", {"rewards": [1, 0], "group": [0, 0], "ratio": 2.0}, "ratio: wrong value; expected: 1.0 or 1; got: 2.0"),
        (
            "rollout_is",
            {"logp_train_old": [[0]], "logp_rollout": [[0]], "mask": [[1]], "cap": 2, "weight": "token"},
            "one input would be ignored; expected: one of them; got: cap and weight",
        ),
    ],
)
def test_each_kind_of_fixture_knows_its_own_inputs(
    tmp_path: Path, tool: ModuleType, capsys: Capture, estimator: str, inputs: dict[str, Any], message: str
) -> None:
    assert message in refused(write(tmp_path / "strange.json", [SOUND | {"estimator": estimator, "inputs": inputs}]), tool, capsys)


RATIOS = {"logp_train_old": [[0]], "logp_rollout": [[0]], "mask": [[1]]}
IGNORED = "one input would be ignored; expected: one of them; got: "


@pytest.mark.parametrize(
    ("rule", "note", "message"),
    [
        ({"low": 0.5, "high": 2, "reject_mode": "zero"}, "", f"inputs: {IGNORED}low and reject_mode"),
        ({"high": 2, "reject_mode": "mask"}, "MIS", f"inputs: {IGNORED}high and reject_mode"),
        ({"low": 0.5, "high": 2, "weight_normalize": True}, "", f"inputs: {IGNORED}low and weight_normalize"),
        ({"weight_clip": [0, 1.5]}, "", "inputs.weight_clip: has no effect while weight is none"),
        ({"weight_clip": [0, 2]}, "", "inputs.weight_clip: has no effect while weight is none"),
        ({"weight_clip": None, "weight": "none"}, "", "inputs.weight_clip: has no effect while weight is none"),
        ({"weight_normalize": False}, "", "inputs.weight_normalize: has no effect while weight is none"),
        ({"reject_outside": [0.5, 2]}, "", "inputs.reject_outside: has no effect while reject is none"),
        ({"weight": "token", "reject_outside": [0.5, 2]}, "", "inputs.reject_outside: has no effect while reject is none"),
        ({"weight": "token", "reject_outside": None}, "", "inputs.reject_outside: has no effect while reject is none"),
        ({"weight": "token", "reject_mode": "mask"}, "", "inputs.reject_mode: has no effect while reject is none and there is no veto"),
        ({"low": 3, "high": 2}, "", "inputs.low: wrong value; expected: below high 2; got: 3"),
        ({"low": 2, "high": 2}, "MIS", "inputs.low: wrong value; expected: below high 2; got: 2"),
        ({"low": 3, "cap": 2}, "", "inputs.low: wrong value; expected: below cap 2; got: 3"),
        ({"low": 3}, "token TIS", "inputs.low: has no effect without high or cap"),
        ({"reject": "token"}, "", "inputs.reject_outside: must be set with reject token"),
        ({"reject": "token", "reject_outside": None}, "", "inputs.reject_outside: must be set with reject token"),
        ({"reject": "token", "reject_outside": [0, 2]}, "", "inputs.reject_outside: must be [low, high] with 0 < low < high"),
        ({"weight": "token", "weight_clip": [-1, 2]}, "", "inputs.weight_clip: must be [low, high] with 0 <= low < high"),
        ({"veto": 2}, "", "inputs.veto: must be in (0, 1), got 2"),
    ],
)
def test_a_correction_with_a_part_that_is_ignored_or_impossible_is_refused(
    tmp_path: Path, tool: ModuleType, capsys: Capture, rule: dict[str, Any], note: str, message: str
) -> None:
    fixture = SOUND | {"estimator": "rollout_is", "inputs": RATIOS | rule, "note": note}
    assert f"fixtures[0].{message}" in refused(write(tmp_path / "rule.json", [fixture]), tool, capsys)


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        ({"low": 0.5}, "MIS: no upper bound"),
        ({"veto": 0.1}, ""),
        ({"low": 0.5, "high": 2, "veto": 0.1}, "TIS"),
        ({"weight": "token", "veto": 0.1, "reject_mode": "zero"}, ""),
        ({"weight": "token", "weight_clip": None, "weight_normalize": True}, ""),
        ({"reject": "geometric", "reject_outside": [0.5, 2], "reject_mode": "zero"}, ""),
    ],
)
def test_a_correction_whose_every_part_has_an_effect_is_accepted(
    tmp_path: Path, tool: ModuleType, capsys: Capture, rule: dict[str, Any], note: str
) -> None:
    fixture = SOUND | {"estimator": "rollout_is", "inputs": RATIOS | rule, "note": note, "expected": {"weights": [[1]]}}
    assert tool.main([str(write(tmp_path / "rule.json", [fixture]))]) == 0
    assert capsys.readouterr().out == "1 passed, 0 failed\n"


@pytest.mark.parametrize("depth", [9, 600, 900])
@pytest.mark.parametrize("place", ["expected", "variants", "inputs", "estimator"])
def test_a_value_that_is_nested_too_deep_is_one_line(tmp_path: Path, tool: ModuleType, capsys: Capture, place: str, depth: int) -> None:
    value = "[" * depth + "1" + "]" * depth
    fixture = json.dumps(SOUND | {place: "HERE" if place == "estimator" else {"values": "HERE"}}).replace('"HERE"', value)
    path = tmp_path / "deep.json"
    path.write_text(f'{{"fixtures": [{fixture}]}}')
    assert "fixtures[0]." in refused(path, tool, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file cannot be read"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "wrong value; expected: an object; got: []"),
        (b"null", "wrong value; expected: an object; got: None"),
        (b"{}", "fixtures is missing"),
        (b'{"fixtures": []}', "no fixture; expected: at least one"),
        (b'{"fixtures": {}}', "fixtures: wrong type; expected: a list, each entry an object; got: {}"),
        (b'{"fixtures": [3]}', "fixtures[0]: wrong value; expected: an object; got: 3"),
        (b'{"fixture": [], "fixtures": []}', "unknown name 'fixture'"),
        (b'{"fixtures": [], "fixtures": []}', "a name is given twice; expected: once; got: 'fixtures'"),
        (b'{"fixtures": [{"id": "a", "estimator": "kl"}]}', "fixtures[0]: inputs is missing"),
        (b'{"fixtures": [{"id": 1, "estimator": "kl", "inputs": {}, "expected": {}}]}', "fixtures[0].id: wrong value"),
        (b'{"fixtures": [{"id": "a", "estimator": "kl", "inputs": {}, "expected": {}}]}', "expected: no field; expected: at least one"),
        (b'{"fixtures": [{"id": "a", "estimator": "kl", "inputs": {}, "expected": {"k1": NaN}}]}', "fixtures[0].expected.k1: wrong value"),
        (
            b'{"fixtures": [{"id": "a", "estimator": "kl", "inputs": {}, "expected": {"k1": 1e999}}]}',
            "fixtures[0].expected.k1: wrong value",
        ),
        (
            b'{"fixtures": [%s, %s]}' % ((b'{"id": "a", "estimator": "kl", "inputs": {"x": [1]}, "expected": {"k1": [1]}}',) * 2),
            "fixtures[1].id: an id is given twice; expected: another id; got: 'a', as in fixtures[0]",
        ),
        (
            b'{"fixtures": [{"id": "a", "estimator": "kl", "inputs": {}, "expected": {"k1": 1}}], "conventions": {"tolerance": "low"}}',
            "conventions.tolerance: wrong value",
        ),
    ],
)
def test_an_unusable_file_is_one_line(tmp_path: Path, tool: ModuleType, capsys: Capture, content: bytes | None, message: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(path, tool, capsys)


def test_a_name_that_is_close_to_a_known_one_is_told(tmp_path: Path, tool: ModuleType, capsys: Capture) -> None:
    path = write(tmp_path / "close.json", [SOUND | {"inputs": {"values": [[0.5]], "lamm": 1}}])
    assert refused(path, tool, capsys).endswith("names that match .*kl.*; got: 'lamm'; fix: write lam, or remove it\n")


def test_a_directory_is_one_line(tmp_path: Path, tool: ModuleType, capsys: Capture) -> None:
    assert "the file cannot be read; expected: a JSON file of fixtures; got: Is a directory" in refused(tmp_path, tool, capsys)


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of a tree; of a list its first and last entries."""
    yield place
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*place, name))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[i], (*place, i))


def at(tree: Any, place: Place) -> Any:
    for part in place:
        tree = tree[part]
    return tree


def changed(tree: Any, place: Place, change: Callable[[Any, str | int], None]) -> Any:
    """A copy in which `change` was made to the container at the end of the place."""
    copied = copy.deepcopy(tree)
    change(at(copied, place[:-1]), place[-1])
    return copied


def mutants(tree: Any) -> Iterator[Change]:
    """Each key deleted and renamed, an unknown key in each object, each value of another type, each list cut."""

    def put(value: Any) -> Callable[[Any, str | int], None]:
        return lambda container, key: container.__setitem__(key, value)

    for place in places(tree):
        value = at(tree, place)
        if isinstance(value, dict):
            yield "added", place, changed(tree, (*place, "moon"), put(1))
        if not place:
            continue
        yield "deleted", place, changed(tree, place, lambda container, key: container.__delitem__(key))
        if isinstance(place[-1], str):
            yield "renamed", place, changed(tree, place, lambda container, key: container.__setitem__(f"{key}x", container.pop(key)))
        for wrong in WRONG:
            if type(wrong) is not type(value) or isinstance(wrong, float):
                yield f"became {wrong!r}", place, changed(tree, place, put(wrong))
        if not isinstance(value, list | dict):
            yield "wrapped", place, changed(tree, place, put([value]))


def keeps_its_meaning(done: str, place: Place, tree: Any) -> bool:
    """Whether such a file rightly passes."""
    part, name = (place[2] if len(place) > 2 else None), place[-1]
    value = at(tree, place)
    if place[:1] == ("conventions",) or place in (("version",), ("digits",)):
        return done == "deleted"
    if part in ("note", "id", "variants"):  # texts; and the names of variants that are not compared are printed
        return True
    if done == "became True":
        return value == 1  # a flag
    if part == "expected":
        return done == "deleted" and len(place) == 4  # the other fields are compared all the same
    if done == "became None":
        return name == "reward_clip" or (place[3] == "cases" and name == 4)  # a bound that held nothing
    if done == "became 'moon'":
        return place[3] == "group"  # a name as good as another where it stands alone, or where all scores are equal
    if done == "deleted" and len(place) == 4:
        all_ones = name == "mask" and all(flag for row in value for flag in row)
        return all_ones or name in STATEMENTS or (name in DEFAULTS and DEFAULTS[name] == value)
    return done == "deleted" and (place[3] == "groups" or value in (0, []))  # one equal score less; padding; an empty row


def unlike(fixtures: list[Any]) -> Iterator[Any]:
    """One of those that have the same names in them."""
    seen = set()
    for fixture in fixtures:
        kind = (fixture["estimator"], *fixture["inputs"], *fixture["expected"], *fixture.get("variants", {}))
        if kind not in seen:
            seen.add(kind)
            yield fixture


def test_no_mutation_of_the_golden_file_passes_or_ends_in_a_traceback(tool: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    golden = json.loads(tool.GOLDEN.read_text())
    head = {name: value for name, value in golden.items() if name != "fixtures"}
    path, passed, num_lines, num_refused, failed = tmp_path / "file.json", [], set(), 0, 0
    with tool.Ranks(2) as ranks:  # dist_whiten would start its own for every file
        for number, fixture in enumerate(unlike(golden["fixtures"])):
            setting = tool.Setting(ranks if fixture["estimator"] == "dist_whiten" else tool.Ranks())
            tree = (head if number == 0 else {}) | {"fixtures": [fixture]}
            for done, place, mutant in mutants(tree):
                path.write_text(json.dumps(mutant))
                try:
                    fixtures, tolerance = tool.load(path)
                    tool.check_known(fixtures, path, [one["estimator"] for one in fixtures])
                except tool.UnusableFileError as error:
                    num_refused += 1
                    num_lines.add(len(str(error).splitlines()))
                    continue
                problems = [problem for one in fixtures for problem in tool.check(one, setting, tolerance)[0]]
                failed += bool(problems)
                if not problems and not keeps_its_meaning(done, place, tree):
                    passed.append((fixture["id"], done, place))
    assert passed == []
    assert num_lines == {1}
    assert num_refused > failed > 100
    assert capsys.readouterr().err == ""
