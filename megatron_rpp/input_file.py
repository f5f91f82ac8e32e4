"""Files that somebody else made: settings, models, prompts. They are read with a limit, and only if they are regular files.

A named pipe blocks its reader, a device has no end, and a sparse file of a terabyte takes all memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import IO, Any, NoReturn

from megatron_rpp.errors import RppError

MAX_JSON_BYTES = 64 * 2**20  # the index of DeepSeek-V3's 91,000 tensors has 9 MB
MAX_DEPTH = 64  # of lists and objects in each other
_REPAIR = "repair the file, or download it again"
_JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def why_unreadable(path: Path, *, is_directory: bool = False) -> str | None:
    """Why `path` is not a file that this process can read, in a few words; None if it is one.

    is_directory: a directory is wanted instead.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such directory" if is_directory else "no such file"
    except OSError as error:
        return error.strerror
    except ValueError:  # NUL, or half of a surrogate pair
        return "no file can have this name"
    if is_directory != stat.S_ISDIR(mode) or not (is_directory or stat.S_ISREG(mode)):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a file")
        return f"{kind}, not a directory" if is_directory else f"{kind}, not a regular file"
    return None if os.access(path, os.R_OK) else os.strerror(errno.EACCES)


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading. Raises: OSError, for anything else too; its `strerror` says why."""
    reason = why_unreadable(path)
    if reason == "no such file":
        raise FileNotFoundError(errno.ENOENT, reason, str(path))
    if reason is not None:
        raise OSError(errno.EINVAL, reason, str(path))
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")  # never waits, whatever `path` is by now


def read_bytes(path: Path, *, max_bytes: int | None = None) -> bytes:
    """All of a regular file. Raises: OSError, also for a file of more than `max_bytes`; its `strerror` says why."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {max_bytes:,} are read", str(path))
        return file.read() if max_bytes is None else file.read(max_bytes)


def read_object(path: Path, kind: type[RppError], *, fix: str = "download the file again", default: Any = None) -> Any:
    """The JSON object in a file, as a dict.

    kind: the class of the error.
    fix: what to do if there is no such file, or it cannot be read.
    default: returned if there is no such file, unless it is None.
    Raises: `kind` naming the file, as `parse_json` and also if the value is not an object.
    """
    try:
        value = parse_json(read_bytes(path, max_bytes=MAX_JSON_BYTES))
    except OSError as error:
        if default is not None and isinstance(error, FileNotFoundError):
            return default
        raise kind("cannot read the file", where=str(path), got=error.strerror, fix=fix) from None
    except ValueError as error:
        raise kind("cannot read the file as JSON", where=str(path), got=error, fix=_REPAIR) from None
    if not isinstance(value, dict):
        raise kind("the file does not hold a JSON object", where=str(path), got=kind_of(value), fix=_REPAIR)
    return value


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises: ValueError, which says why, for text that is not JSON (NaN and Infinity are not), for a name that an object has twice
    (readers differ in which one they take), and for values that Python or its libraries cannot use: numbers beyond the range of a
    float, numbers of thousands of digits, halves of surrogate pairs, and more than MAX_DEPTH levels.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):
            raise ValueError("a number has thousands of digits") from None
        raise
    if _is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if "\\ud" in text.lower():
        _check_surrogates(value)
    return value


def kind_of(value: Any) -> str:
    """What a value is in the words of JSON."""
    return _JSON_KINDS[type(value)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is beyond the range of a float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:60]!r} is given twice in one object")
            seen.add(name)
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += item.values()
            elif isinstance(item, list):
                inside += item
        if not inside:
            return False
        level = inside
    return True


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
