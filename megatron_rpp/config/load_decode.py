"""From a tree of plain values to the frozen `Config`, strictly, with every mistake explained in the user's own words."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_rpp.config.load_yaml import KeyPath
from megatron_rpp.config.problems import Problem, refuse
from megatron_rpp.config.ranges import range_of
from megatron_rpp.config.schema import Config

_ADAPTER = TypeAdapter(Config)
_MAX_EXPLAINED = 50  # the search for a similar name takes milliseconds
_MAX_NUMBER = 2**63 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, or a byte of the command line that is not UTF-8


def setting_names(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every setting as a dotted name, in the order of the schema."""
    for name, kind in _children(cls).items():
        if is_dataclass(kind):
            yield from setting_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def decode(tree: Mapping[str, Any], lines: Mapping[KeyPath, str], source: str, problems: Sequence[Problem] = ()) -> Config:
    """The configuration in `tree`; nothing is converted that does not already have the right type (an int may stand for a float).

    problems: found before, refused together with those of the tree.
    Raises: ConfigError listing all unknown, missing and wrong settings, each with the file and line that it came from.
    """
    refuse([*_unusable((), tree, lines)], source)
    found = {problem.path: problem for problem in problems}
    is_all = True
    try:
        cfg = _ADAPTER.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            if len(found) >= _MAX_EXPLAINED:
                is_all = False
                break
            for problem in _explain(detail, tree, lines):
                found.setdefault(problem.path, problem)  # a union reports once for each of its members
    written = {line: order for order, line in enumerate(lines.values())}
    refuse(sorted(found.values(), key=lambda problem: written.get(problem.where, -1)), source, is_all=is_all)
    return cfg


def _unusable(path: KeyPath, value: Any, lines: Mapping[KeyPath, str]) -> Iterator[Problem]:
    """Whole numbers that no library takes, which messages further down could not hold either, and text that no file can hold."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unusable((*path, name), name, lines)
            yield from _unusable((*path, name), inner, lines)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unusable((*path, str(index)), inner, lines)
    elif isinstance(value, int) and not -_MAX_NUMBER - 1 <= value <= _MAX_NUMBER:
        dotted = ".".join(path)
        problem = f"expected a number from {-_MAX_NUMBER - 1} to {_MAX_NUMBER}, got {_show(value)}"
        if (allowed := range_of(dotted)) is not None and allowed.high is not None:
            problem = allowed.problem(value) or problem
        yield Problem(dotted, problem, _line(path, lines))
    elif isinstance(value, str) and _SURROGATE.search(value):
        yield Problem(".".join(path), f"expected text in UTF-8, got {_show(value)}", _line(path, lines))


def _explain(detail: Mapping[str, Any], tree: Mapping[str, Any], lines: Mapping[KeyPath, str]) -> Iterator[Problem]:
    path = _in_tree(tuple(str(part) for part in detail["loc"]), tree, missing=detail["type"] == "missing")
    dotted, where = ".".join(path), _line(path, lines)
    if detail["type"] == "missing" and path[-1].isdigit():
        parent = path[:-1]
        yield Problem(".".join(parent), f"expected {_length(parent)} values, got {_show(detail['input'])}", where)
    elif detail["type"] == "too_long":
        yield Problem(dotted, f"expected {_length(path)} values, got {_show(detail['input'])}", where)
    elif detail["type"] == "missing":
        for name in _required(path):
            yield Problem(name, "required, and not set", where)
    elif detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        yield Problem(dotted, f"unknown setting; {_suggest(path)}", where)
    elif detail["type"] in ("dict_type", "dataclass_type"):
        yield Problem(dotted, f"expected a section with settings of its own, got {_show(detail['input'])}", where)
    else:
        yield Problem(dotted, f"expected {_expected(path, detail)}, got {_show(detail['input'])}", where)


def _in_tree(loc: KeyPath, tree: Any, *, missing: bool) -> KeyPath:
    """`loc` without the names of union members that pydantic appends: the part that leads to something in the tree."""
    kept: list[str] = []
    for part in loc:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif missing or (isinstance(tree, list) and part.isdigit()):
            tree = None
        else:
            break
        kept.append(part)
    return tuple(kept)


def _line(path: KeyPath, lines: Mapping[KeyPath, str]) -> str:
    """Where a value was written, or something inside it, or the nearest section around it."""
    inside = [line for written, line in lines.items() if written[: len(path)] == path]
    if inside:
        return inside[0]
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return ""


def _required(path: KeyPath) -> list[str]:
    """A missing section stands for all settings in it that have no default."""
    kind = _kind_at(path)
    if not is_dataclass(kind):
        return [".".join(path)]
    names = [spec.name for spec in fields(kind) if spec.default is MISSING and spec.default_factory is MISSING]
    return [name for child in names for name in _required((*path, child))]


def _suggest(path: KeyPath) -> str:
    *parents, leaf = path
    siblings = list(_children(_kind_at(tuple(parents))))
    names = list(setting_names())
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
    far = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in names], n=1, cutoff=0.75)
    if close and (not elsewhere or difflib.SequenceMatcher(None, leaf, close[0]).ratio() > 0.8):
        return f"did you mean {'.'.join([*parents, close[0]])}?"
    if elsewhere or far:
        return f"did you mean {(elsewhere or [name for name in names if name.rpartition('.')[2] == far[0]])[0]}?"
    return f"there are {', '.join(siblings)}"


_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a word",
    "tuple_type": "a list",
}


def _expected(path: KeyPath, detail: Mapping[str, Any]) -> str:
    if path[:-1] in (("model", "megatron"), ("rollout", "sglang")):
        return "a word, a number, true, false or null"
    if path[:-1] == ("rollout", "stop_tokens"):
        return "a token id, or the text of a token"
    kind = _kind_at(path)
    kinds = get_args(kind) or (kind,)
    expected = "a path" if Path in kinds else _WORDS.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    return f"{expected} or null" if NoneType in kinds else expected


def _length(path: KeyPath) -> int:
    """Of the tuple that belongs at `path`."""
    kind = _kind_at(path)
    pair = next(member for member in (kind, *get_args(kind)) if get_origin(member) is tuple)
    return len(get_args(pair))


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _children(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls) if is_dataclass(cls) else {}


def _kind_at(path: KeyPath) -> Any:
    kind: Any = Config
    for part in path:
        kind = _children(kind).get(part)
    return kind
