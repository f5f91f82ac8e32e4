"""Rows of JSONL and parquet files, with the line that each came from. A line that is not a row is reported, not raised."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rpp.errors import DataError
from megatron_rpp.input_file import open_file, why_unreadable

MAX_LINE_BYTES = 64 * 2**20  # a longer line is no row: the file is of another kind, or damaged


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. line counts from 1; in a parquet file it is the row number."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Row:
    line: int
    fields: Mapping[str, object]


def iter_rows(path: Path, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of a .jsonl (blank lines left out) or .parquet file, which only reads `columns`. Raises: DataError if it cannot be read."""
    readers = {".jsonl": lambda path, columns: iter_jsonl(path), ".parquet": _iter_parquet}
    if path.suffix not in readers:
        raise DataError(f"files of type {path.suffix or 'none'!r} are not read", where=str(path), expected=" or ".join(readers))
    if reason := why_unreadable(path):
        raise DataError("cannot read the file", where=str(path), got=reason, fix="relative paths start at the working directory")
    return readers[path.suffix](path, columns)


def field_of(fields: Mapping[str, object], key: str) -> object:
    """The value under `key`, or under the path that `key` is, as in "reward_model.ground_truth". None when there is none."""
    if key in fields:
        return fields[key]
    first, dot, rest = key.partition(".")
    inner = fields.get(first)
    return field_of(inner, rest) if dot and isinstance(inner, Mapping) else None


def number_text(value: object) -> str | None:
    """A number as text, 27.0 as "27" and 1e23 with all its zeros; None for what is no number.

    Raises: ValueError for a number that is not finite, as 1e999 and a table's NaN are.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"is {value}, which is not a finite number")
    text = f"{Decimal(repr(value)) if isinstance(value, float) else value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def iter_jsonl(path: Path) -> Iterator[Row | BadRow]:
    """The objects of a file with one JSON value on each line, blank lines left out. Raises: DataError if it cannot be read."""
    try:
        with open_file(path) as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if len(line) > MAX_LINE_BYTES:
                    expected = f"one JSON object on each line, of at most {MAX_LINE_BYTES:,} bytes"
                    raise DataError("the line is too long", where=f"{path}:{number}", expected=expected)
                if not line:
                    return
                if line.strip():
                    yield _parse_line(line, number, str(path))
    except OSError as error:
        raise DataError("cannot read the file", where=str(path), got=error.strerror) from None


def _parse_line(line: bytes, number: int, file: str) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return BadRow(file, number, f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return BadRow(file, number, f"not JSON: {error}")
    if not isinstance(value, dict):
        return BadRow(file, number, f"a JSON {type(value).__name__}, expected an object")
    return Row(number, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _iter_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError("parquet files need pyarrow", where=str(path), fix="pip install pyarrow, or convert the file to .jsonl") from None
    try:
        with parquet.ParquetFile(path) as file:
            for name in columns:
                _check_column(name, {field.name: field.type for field in file.schema_arrow}, path, arrow.types)
            number = 0
            for batch in file.iter_batches(columns=list(columns)):  # "a.b" reads the field b of column a alone
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError("the parquet file does not read", where=str(path), got=f"{type(error).__name__}: {error}") from error


def _check_column(name: str, kinds: Mapping[str, Any], path: Path, types: ModuleType) -> None:
    """Raises: DataError when no column, or no field of a nested one, has that name. kinds: of the columns."""
    if name in kinds:
        return
    first, _, rest = name.partition(".")
    if first not in kinds:
        raise DataError(f"column {name!r} is missing", where=str(path), got=", ".join(kinds))
    if not types.is_struct(kinds[first]):
        what = f"column {first!r} has no fields"
        raise DataError(what, where=str(path), expected=f"an object with the field {rest!r}", got=str(kinds[first]))
    fields = {field.name: field.type for field in kinds[first]}
    if rest not in fields and rest.partition(".")[0] not in fields:
        raise DataError(f"column {first!r} has no field {rest!r}", where=str(path), got=", ".join(fields))
    _check_column(rest, fields, path, types)
