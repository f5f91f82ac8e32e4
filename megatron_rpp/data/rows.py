"""Rows of JSONL and parquet files, with the line that each came from. A line that is not a row is reported, not raised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp.errors import DataError


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
    readers = {".jsonl": _iter_jsonl, ".parquet": _iter_parquet}
    if path.suffix not in readers:
        raise DataError(f"files of type {path.suffix or 'none'!r} are not read", where=str(path), expected=" or ".join(readers))
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), fix="relative paths start at the working directory")
    return readers[path.suffix](path, columns)


def _iter_jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(line, number, str(path))


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
            present = [name for name in columns if name in file.schema_arrow.names]
            if missing := sorted(set(columns) - set(present)):
                raise DataError(f"column {missing[0]!r} is missing", where=str(path), got=", ".join(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(columns=present):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError("the parquet file does not read", where=str(path), got=f"{type(error).__name__}: {error}") from error
