"""Typed access to the entries of a config.json: each mistake is an error that names the file and the entry."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rpp.errors import ConfigError

Json = Mapping[str, Any]
_MAX_SIZE = 2**63 - 1  # torch counts the elements of a tensor in 64 bits


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of one JSON object.

    values: the parsed object.
    where: the file, for messages.
    """

    values: Json
    where: str

    def size(self, name: str, default: int | None = None, *, most: int = _MAX_SIZE) -> int:
        """A positive whole number up to `most`; `default` if the entry is absent or null. Raises: ConfigError."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError("this entry is missing", where=self.at(name), expected="a positive whole number")
        return self._whole(name, value, 1, most)

    def count(self, name: str) -> int:
        """A whole number of 0 or more; null means 0. Raises: ConfigError, also when the entry is absent."""
        if name not in self.values:
            raise ConfigError("this entry is missing", where=self.at(name), expected="a whole number")
        value = self.values[name]
        return self._whole(name, 0 if value is None else value, 0)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; `default` if the entry is absent or null. Raises: ConfigError."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError("this entry is missing", where=self.at(name), expected="a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise ConfigError("this entry is not a number", where=self.at(name), expected="a finite number", got=_show(value))
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false if the entry is absent or null. Raises: ConfigError."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError("this entry is not a flag", where=self.at(name), expected="true or false", got=repr(value))
        return bool(value)

    def items(self, name: str) -> list[Any]:
        """A list; empty if the entry is absent or null. Raises: ConfigError."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list | tuple):
            raise ConfigError("this entry is not a list", where=self.at(name), expected="a list, such as []", got=repr(value))
        return list(value or ())

    def layers(self, name: str) -> set[int]:
        """Numbers of layers; empty if the entry is absent or null. Raises: ConfigError."""
        found = self.items(name)
        for value in found:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                expected = "whole numbers of 0 or more, such as [0, 1]"
                raise ConfigError("this entry is not a list of layer numbers", where=self.at(name), expected=expected, got=_show(value))
        return set(found)

    def at(self, name: str) -> str:
        """The place of an entry, for messages."""
        return f"{self.where}: {name}"

    def _whole(self, name: str, value: Any, least: int, most: int = _MAX_SIZE) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            expected = "a positive whole number" if least else "a whole number of 0 or more"
            raise ConfigError("this entry is not a size", where=self.at(name), expected=expected, got=_show(value))
        if value > most:
            expected = f"a whole number of at most {most}"
            raise ConfigError("this entry is not a size", where=self.at(name), expected=expected, got=_show(value))
        return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
