"""The YAML that settings are written in: plain scalars mean what they look like, and every value knows its line.

Differs from PyYAML's default on purpose: `1e-6` is a number, only `true` and `false` are booleans (`no`, `off` and `yes`
are words), `010` and `1:30` are words and not octal or sexagesimal numbers, dates are words. A key given twice is an
error, and so are aliases (`*name`): `extends` in load.py is the one way to share settings. A file has at most MAX_BYTES bytes
and MAX_DEPTH levels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from megatron_rpp.errors import ConfigError
from megatron_rpp.input_file import read_bytes

KeyPath = tuple[str, ...]
MAX_BYTES = 256 * 2**10  # a file with every setting has 5 KB; a parser in Python takes seconds for more than this
MAX_DEPTH = 16

_SCALARS = (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
)

_WRITTEN = {name: re.compile(pattern) for name, pattern, _ in _SCALARS}
_WRITTEN["float"] = re.compile(f"{_WRITTEN['float'].pattern}|{_WRITTEN['int'].pattern}")
_MAX_DIGITS = 400  # Python itself stops at 4,300
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 -- PyYAML's own protocol; filled below
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises: ComposerError at the first node that is too deep, before Python's stack ends."""
        if self._depth >= MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 -- the same table, so that what would be read otherwise is quoted

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: its value, and where each key path in it was written, as file:line."""

    value: Any
    lines: dict[KeyPath, str]


def parse(text: str, name: str) -> Document:
    """Parse one YAML document; `name` stands for it in error messages.

    Raises: ConfigError with file:line for bad syntax, control characters, too many levels, a key given twice, or a key that is not
    a word.
    """
    try:
        loader = _Loader(text)
    except ReaderError as error:
        where = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        expected = "printable text; in double quotes, a control character can be written as \\x1b"
        raise ConfigError("YAML does not allow this character", where=where, expected=expected, got=f"U+{error.character:04X}") from None
    loader.name = name
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, str] = {}
        if node is not None:
            _walk(node, (), name, lines, set())
        return Document(loader.construct_document(node) if node is not None else None, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    finally:
        loader.dispose()


def read(path: Path) -> Document:
    """Parse a file. Raises: ConfigError when it cannot be read."""
    try:
        return parse(read_bytes(path, max_bytes=MAX_BYTES).decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read the settings: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a text file in UTF-8: {error.reason} at byte {error.start}", where=str(path)) from None


def write(value: Any) -> str:
    """The text, in ASCII, from which `parse` gives `value` back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=140)


def _walk(node: yaml.Node, path: KeyPath, name: str, lines: dict[KeyPath, str], visited: set[int]) -> None:
    where = f"{name}:{node.start_mark.line + 1}"
    if id(node) in visited:
        fix = "write the value out, or share a file with `extends`"
        raise ConfigError(f"{'.'.join(path)} is an alias of another value", where=where, fix=fix)
    if node.tag not in _TAGS:
        raise ConfigError(f"{'.'.join(path)} has the tag {node.tag}", where=where, expected="plain values, lists and sections")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, path, where)
    visited.add(id(node))
    lines.setdefault(path, where)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, str(index)), name, lines, visited)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            _walk(item, _key_path(key, path, name, lines), name, lines, visited)


def _key_path(key: yaml.Node, path: KeyPath, name: str, lines: dict[KeyPath, str]) -> KeyPath:
    where = f"{name}:{key.start_mark.line + 1}"
    if key.tag != "tag:yaml.org,2002:str":
        raise ConfigError("a key must be a word", where=where, got=repr(key.value) if isinstance(key.value, str) else "a list or mapping")
    full = (*path, key.value)
    if full in lines:
        raise ConfigError(f"{'.'.join(full)} is given twice", where=where, expected=f"once, as at {lines[full]}")
    lines[full] = where
    return full


def _check_scalar(node: yaml.ScalarNode, path: KeyPath, where: str) -> None:
    """Raises: ConfigError. An explicit tag such as !!bool takes what the type looks like without the tag, and nothing else."""
    dotted, tag = ".".join(path) or "the value", node.tag.rpartition(":")[2]
    if tag in _WRITTEN and not _WRITTEN[tag].fullmatch(node.value):
        raise ConfigError(f"{dotted} has the tag !!{tag} and another value", where=where, got=repr(node.value))
    if tag == "int" and len(node.value) > _MAX_DIGITS:
        raise ConfigError(f"{dotted} has {len(node.value)} digits", where=where, expected=f"a number of at most {_MAX_DIGITS} digits")
