"""The list of a checkpoint's files: name -> bytes and CRC-32. Written last, compared before anything is read.

It finds damage. It is no defense: anyone who can change a file can change the list too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rpp.errors import CheckpointError
from megatron_rpp.files import write_whole
from megatron_rpp.input_file import MAX_JSON_BYTES, parse_json, read_bytes
from megatron_rpp.torch_dist.pickles import FETCH

MANIFEST = "files.json"

Fingerprint = dict[str, int]


def read_json_file(file: Path) -> Any:
    """A small JSON file of a checkpoint.

    Raises: CheckpointError naming it when it is no regular file, too large, or not JSON.
    """
    try:
        return parse_json(read_bytes(file, max_bytes=MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError("cannot read the file", where=str(file), got=error.strerror, fix=FETCH) from error
    except ValueError as error:
        raise CheckpointError("cannot read the file as JSON", where=str(file), got=error, fix=FETCH) from error


def read_manifest(folder: Path) -> dict[str, Fingerprint]:
    """The fingerprint of every file of a checkpoint, by its name.

    Raises: CheckpointError when the list is missing or malformed, or when it and the directory do not hold
    the same files.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise CheckpointError(f"the checkpoint is incomplete: its list of files, {MANIFEST}, is missing", where=str(folder), fix=FETCH)
    found = read_json_file(file)
    if not isinstance(found, dict) or not found:
        got = type(found).__name__ if found else "none"
        raise CheckpointError("not a list of files", where=str(file), expected="an object with an entry for each file", got=got, fix=FETCH)
    for name, entry in found.items():
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
            raise CheckpointError("a name is not that of a file beside it", where=str(file), got=ascii(name), fix=FETCH)
        if not isinstance(entry, dict) or set(entry) != {"bytes", "crc32"} or any(type(n) is not int or n < 0 for n in entry.values()):
            expected = '{"bytes": N, "crc32": N}'
            raise CheckpointError(
                f"the entry of {name!a} is malformed", where=str(file), expected=expected, got=str(entry)[:200], fix=FETCH
            )
    _check_names(folder, found)
    return found


def _check_names(folder: Path, listed: Mapping[str, Fingerprint]) -> None:
    present = {path.name for path in folder.iterdir() if not path.is_dir()} - {MANIFEST}
    if missing := sorted(listed.keys() - present):
        raise CheckpointError(f"{missing[0]!a} is missing", where=str(folder), expected=f"the files of {MANIFEST}", fix=FETCH)
    if extra := sorted(present - listed.keys()):
        fix = "remove it if it does not belong to the checkpoint; else take another checkpoint"
        raise CheckpointError(f"{extra[0]!a} is not in the list of files", where=str(folder), expected=f"the files of {MANIFEST}", fix=fix)


def check_size(path: Path, recorded: Fingerprint) -> None:
    """Raises: CheckpointError when a file is missing or has another size than the list says."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing", where=str(path.parent), fix=FETCH)
    if (size := path.stat().st_size) != recorded["bytes"]:
        what = f"{path.name} is damaged: {size} bytes where {recorded['bytes']} were written"
        raise CheckpointError(what, where=str(path.parent), fix=FETCH)


def check_content(path: Path, recorded: Fingerprint) -> None:
    """Raises: CheckpointError when a file is not what was written. Reads all of it."""
    check_size(path, recorded)
    if fingerprint(path) != recorded:
        raise CheckpointError(f"{path.name} is damaged: its checksum is not that of what was written", where=str(path.parent), fix=FETCH)


def fingerprint(file: Path) -> Fingerprint:
    """Bytes and CRC-32 of a file. Raises: OSError."""
    crc, size = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def write_manifest(folder: Path, files: Mapping[str, Fingerprint]) -> None:
    """Raises: StorageError."""
    write_whole(folder / MANIFEST, json.dumps(dict(files), indent=1, sort_keys=True) + "\n")
