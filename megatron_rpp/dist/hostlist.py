"""Slurm's compressed lists, without asking scontrol (which containers do not have)."""

from __future__ import annotations

import re

from megatron_rpp.errors import ConfigError

_ENTRY = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
MAX_HOSTS = 65536  # a typing error such as [1-99999999] is refused, not expanded


def expand_hosts(text: str, where: str = "node list") -> tuple[str, ...]:
    """The hosts of a Slurm node list, in its order: 'node[01-03,07],x5' -> node01 node02 node03 node07 x5.

    Leading zeros give the width. Several brackets in a name multiply, the last varying fastest: 'r[1-2]n[1-2]'.
    Raises: ConfigError when it cannot be read.
    """
    entries = _ENTRY.findall(text)
    if not text or ",".join(entries) != text:
        raise _unreadable(text, where)
    hosts: list[str] = []
    for entry in entries:
        hosts += _expand_entry(entry, text, where)
    return tuple(hosts)


def expand_tasks_per_node(text: str, where: str = "tasks per node") -> tuple[int, ...]:
    """The number of tasks on each node: '4(x2),3' -> 4 4 3.

    Raises: ConfigError when it cannot be read.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = _TASKS.fullmatch(entry)
        if match is None:
            raise ConfigError("cannot read the number of tasks on each node", where=where, expected="such as 4(x2),3", got=repr(text))
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def _expand_entry(entry: str, text: str, where: str) -> list[str]:
    names = [""]
    position = 0
    for match in _BRACKETS.finditer(entry):
        literal, numbers = entry[position : match.start()], _expand_ranges(match[1], text, where)
        if len(names) * len(numbers) > MAX_HOSTS:
            raise _unreadable(text, where)
        names = [name + literal + number for name in names for number in numbers]
        position = match.end()
    return [name + entry[position:] for name in names]


def _expand_ranges(ranges: str, text: str, where: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not 0 <= int(last) - int(first) < MAX_HOSTS:
            raise _unreadable(text, where)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _unreadable(text: str, where: str) -> ConfigError:
    return ConfigError("cannot read the list of nodes", where=where, expected="such as node[01-03,07],x5", got=repr(text))
