"""Damaged and hostile copies of a run's checkpoint, made from seeds.

The whole number by hand, with a table of what became of them:

    OMP_NUM_THREADS=1 python -m tests.mcore.damaged 250
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.torch_dist.listing import read_listing

SEED = 11
POLICY = "policy"
ODD_VALUES = (None, True, -1, 2**70, 1e999, "x", "", [], {}, [[1]], {"a": {}}, "../x", "\0", "\x1b[31m")
ODD_NUMBERS = (-1, -(2**40), 2**31, 2**40, 2**62, 2**70, 1.5, None, "x", [3])


class Payload:
    """Makes a directory when it is unpickled by a loader that calls what a pickle names."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def saved_bytes(value: Any, *, is_zip: bool = True) -> bytes:
    """What torch.save writes, in its present or its first format."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def list_files(folder: Path) -> None:
    """Make files.json agree with the files, as whoever made the checkpoint could."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != "files.json"}
    listed = {name: {"bytes": len(content), "crc32": zlib.crc32(content)} for name, content in files.items()}
    (folder / "files.json").write_text(json.dumps(listed))


def change_list(folder: Path, change: Callable[[Any], object]) -> None:
    """Unpickle .metadata, which must be one of our own, and write it changed."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def replace_blob(folder: Path, key: str, make: Callable[[bytes], bytes]) -> None:
    """Another blob for a key, appended to its file."""

    def change(found: Any) -> None:
        index, place = next((index, place) for index, place in found.storage_data.items() if index.fqn == key)
        file = folder / place.relative_path
        content = file.read_bytes()
        blob = make(content[place.offset : place.offset + place.length])
        file.write_bytes(content + blob)
        found.storage_data[index].offset, found.storage_data[index].length = len(content), len(blob)

    change_list(folder, change)


def with_pickle(blob: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A zip of torch.save whose pickle is changed and whose checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


def flipped(content: bytes, chance: random.Random, *, within: int | None = None) -> bytes:
    """One to three bits of the first `within` bytes turned over."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        changed[chance.randrange(min(len(changed), within or len(changed)))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def damage(step_dir: Path, seed: int, marker: Path) -> str:
    """Damage a copy of a checkpoint in the way of `seed`, and say how.

    Most have their checksums made right again.
    """
    chance = random.Random(f"{SEED}/{seed}")
    policy = step_dir / POLICY
    kind = list(KINDS)[seed % len(KINDS)]
    said = KINDS[kind](step_dir, chance, marker)
    is_listed = kind not in ("list of files", "state") and chance.random() < 0.7
    if is_listed:
        list_files(policy)
    return f"{kind}: {said}{', checksums right' if is_listed else ''}"


def _file(step_dir: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in (step_dir / POLICY).iterdir() if path.name != "files.json"))


def _bits(step_dir: Path, chance: random.Random, marker: Path) -> str:
    file = _file(step_dir, chance)
    within = chance.choice((None, 300, 3000))
    file.write_bytes(flipped(file.read_bytes(), chance, within=within))
    return f"{file.name}, first {within}"


def _ends(step_dir: Path, chance: random.Random, marker: Path) -> str:
    file, how = _file(step_dir, chance), chance.choice(("cut", "empty", "doubled", "zeros", "longer"))
    content = file.read_bytes()
    middle = len(content) // 2
    changed = {"cut": content[: chance.randrange(len(content))], "empty": b"", "doubled": content * 2, "longer": content + b"\0" * 100}
    file.write_bytes(changed.get(how, content[:middle] + bytes(200) + content[middle + 200 :]))
    return f"{file.name} {how}"


def _files(step_dir: Path, chance: random.Random, marker: Path) -> str:
    policy = step_dir / POLICY
    file, other, how = _file(step_dir, chance), _file(step_dir, chance), chance.choice(("gone", "swapped", "extra", "a folder", "endless"))
    if how == "extra":
        shutil.copy(file, policy / "__9_9.distcp")
    elif how == "swapped":
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second), other.write_bytes(first)
    else:
        file.unlink()
        if how == "a folder":
            file.mkdir()
        elif how == "endless":
            file.symlink_to("/dev/zero")
            (policy / "files.json").write_text(json.dumps({name.name: {"bytes": 0, "crc32": 0} for name in policy.iterdir()}))
    return f"{file.name} {how}"


def _odd_json(value: Any, chance: random.Random) -> Any:
    """The value with one entry, at any depth, of another type; or with an entry that is missing or too
    many.
    """
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        how = chance.random()
        rest = {name: one for name, one in value.items() if name != key}
        return rest if how < 0.1 else {**value, "x": 1} if how < 0.2 else {**rest, key: _odd_json(value[key], chance)}
    return chance.choice(ODD_VALUES)


def _json(file: Path, chance: random.Random) -> str:
    text, how = file.read_text(), chance.choice(("type", "type", "type", "type", "deep", "cut", "bits", "NaN"))
    if how == "type":
        text = json.dumps(_odd_json(json.loads(text), chance))
    elif how == "deep":
        text = "[" * 200_000
    elif how == "cut":
        text = text[: chance.randrange(len(text))]
    elif how == "NaN":
        text = text.replace(": ", ": NaN, ", 1)
    content = flipped(text.encode(), chance) if how == "bits" else text.encode()
    file.write_bytes(content)
    return f"{file.name} {how}: {content[:60]!r}"


def _list_entry(step_dir: Path, chance: random.Random, marker: Path) -> str:
    """A number, a name or a type in .metadata that is not what it was."""
    said = ""

    def change(found: Any) -> None:
        nonlocal said
        index = chance.choice(sorted(found.storage_data, key=str))
        place, entry = found.storage_data[index], found.state_dict_metadata[index.fqn]
        how = chance.choice(("offset", "length", "relative_path", "gone", "no entry", "size", "chunks", "dtype", "transform", "None"))
        odd = chance.choice(ODD_NUMBERS)
        if how in ("offset", "length"):
            setattr(place, how, odd)
        elif how == "relative_path":
            place.relative_path = odd = chance.choice(("../x", "..", "/etc/passwd", "", "x\0", 3, "files.json", "common.pt"))
        elif how == "gone":
            del found.storage_data[index]
        elif how == "no entry":
            del found.state_dict_metadata[index.fqn]
        elif how == "None":
            found.state_dict_metadata[index.fqn] = odd
        elif how == "transform":
            place.transform_descriptors = ["zstd"]
        elif hasattr(entry, "chunks"):
            _change_tensor(entry, how, odd)
        said = f"{how} of {index.fqn}: {odd!r}"

    change_list(step_dir / POLICY, change)
    return said


def _change_tensor(entry: Any, how: str, odd: Any) -> None:
    if how == "size":
        entry.size = torch.Size([2**40, *entry.size[1:]])
    elif how == "dtype":
        entry.properties.dtype = torch.complex64 if odd is None else torch.float16
    elif len(entry.chunks) > 1:
        entry.chunks[0].offsets = entry.chunks[1].offsets  # the same number of elements, one part of it twice
    else:
        entry.chunks.append(entry.chunks[0])


def _inner_pickle(step_dir: Path, chance: random.Random, marker: Path) -> str:
    """Bits of a pickle inside a zip whose checksums are right: of a tensor, an object or the common part."""
    policy = step_dir / POLICY
    listing = read_listing(policy)
    random_states = [key for key in listing.objects if key.startswith("rng/")]
    key = chance.choice(sorted([*listing.tensors, *listing.objects, *random_states, "common.pt", "common.pt"]))

    def change(blob: bytes) -> bytes:
        return with_pickle(blob, lambda content: flipped(content, chance))

    if key == "common.pt":
        (policy / key).write_bytes(change((policy / key).read_bytes()))
    else:
        replace_blob(policy, key, change)
    return key


def _odd_common(step_dir: Path, chance: random.Random, marker: Path) -> str:
    """An entry of common.pt, or of the random states, that is of another type."""
    policy = step_dir / POLICY
    common = torch.load(policy / "common.pt", weights_only=False)
    path = []
    value: Any = common
    while isinstance(value, dict | list) and value and (len(path) < 2 or chance.random() < 0.8):
        holder, key = value, chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        path.append(key)
        value = holder[key]
    holder[key] = odd = chance.choice((*ODD_VALUES, torch.zeros(3), {"params": 1}, float("nan")))
    (policy / "common.pt").write_bytes(saved_bytes(common))
    return f"{path} = {odd!r}"


def _odd_random_state(step_dir: Path, chance: random.Random, marker: Path) -> str:
    policy = step_dir / POLICY
    key = next(key for key in read_listing(policy).objects if key.startswith("rng/"))
    (state,) = torch.load(io.BytesIO(_blob_of(policy, key)), weights_only=False)
    name = chance.choice(sorted(state))
    numpy_state = (*state["numpy"][:2], 10**6, *state["numpy"][3:])
    zeros = torch.zeros(5056, dtype=torch.uint8)
    odd = chance.choice((*ODD_VALUES, zeros[:16], zeros, numpy_state, {"model-parallel-rng": zeros}))
    replace_blob(policy, key, lambda blob: saved_bytes([{**state, name: odd}]))
    return f"{name} = {str(odd)[:60]!r}"


def _blob_of(folder: Path, key: str) -> bytes:
    span = read_listing(folder).objects[key]
    return span.file.read_bytes()[span.start : span.start + span.length]


def _payload(step_dir: Path, chance: random.Random, marker: Path) -> str:
    place = chance.choice(list(PLACES))
    PLACES[place](step_dir / POLICY, Payload(marker))
    return place


def _first(folder: Path, *, is_object: bool, with_part: str) -> str:
    listing = read_listing(folder)
    return next(key for key in sorted(listing.objects if is_object else listing.tensors) if with_part in key)


def _in_tensor(folder: Path, payload: Payload, part: str, *, is_zip: bool = True) -> None:
    key = _first(folder, is_object=False, with_part=part)
    replace_blob(folder, key, lambda blob: saved_bytes(payload, is_zip=is_zip))


def _in_object(folder: Path, payload: Payload, part: str, value: Any, *, is_zip: bool = True) -> None:
    key = _first(folder, is_object=True, with_part=part)
    replace_blob(folder, key, lambda blob: saved_bytes(value, is_zip=is_zip))


def _in_common(folder: Path, change: Callable[[Any], Any], *, is_zip: bool = True) -> None:
    common = torch.load(folder / "common.pt", weights_only=False)
    (folder / "common.pt").write_bytes(saved_bytes(change(common), is_zip=is_zip))


# Every place of a checkpoint that a loader of torch or Megatron unpickles.
PLACES: dict[str, Callable[[Path, Payload], object]] = {
    ".metadata": lambda f, p: (f / ".metadata").write_bytes(pickle.dumps(p)),
    ".metadata, protocol 0": lambda f, p: (f / ".metadata").write_bytes(pickle.dumps(p, protocol=0)),
    ".metadata planner_data": lambda f, p: change_list(f, lambda m: setattr(m, "planner_data", p)),
    ".metadata storage_data": lambda f, p: change_list(f, lambda m: m.storage_data.update({"x": p})),
    ".metadata state_dict_metadata": lambda f, p: change_list(f, lambda m: m.state_dict_metadata.update({"x": p})),
    ".metadata storage_meta": lambda f, p: change_list(f, lambda m: setattr(m, "storage_meta", p)),
    ".metadata of a rank, without the other": lambda f, p: (
        (f / ".metadata").unlink(),
        (f / "__0.metadata").write_bytes(pickle.dumps(p)),
    ),
    "object of a layer": lambda f, p: _in_object(f, p, "_extra_state", [p]),
    "object of a layer, first format": lambda f, p: _in_object(f, p, "_extra_state", [p], is_zip=False),
    "tensor of the model": lambda f, p: _in_tensor(f, p, "word_embeddings"),
    "tensor of the model, first format": lambda f, p: _in_tensor(f, p, "word_embeddings", is_zip=False),
    "common.pt": lambda f, p: _in_common(f, lambda common: p),
    "common.pt, first format": lambda f, p: _in_common(f, lambda common: {**common, "args": p}, is_zip=False),
    "common.pt args": lambda f, p: _in_common(f, lambda common: {**common, "args": p}),
    "common.pt header": lambda f, p: _in_common(f, lambda common: {**common, "header": p}),
    "common.pt optimizer": lambda f, p: _in_common(f, lambda common: {**common, "optimizer": {"optimizer": p}}),
    "tensor of the optimizer": lambda f, p: _in_tensor(f, p, "optimizer.state.exp_avg"),
    "random states": lambda f, p: _in_object(f, p, "rng/", [{"python": p, "numpy": p, "torch": p, "cuda": p, "megatron": p}]),
    "random states, first format": lambda f, p: _in_object(f, p, "rng/", [p], is_zip=False),
}
# What only a resume opens.
OF_A_RESUME = ("tensor of the optimizer", "random states", "random states, first format")

KINDS: dict[str, Callable[[Path, random.Random, Path], str]] = {
    "bits": _bits,
    "ends": _ends,
    "files": _files,
    "list of files": lambda step_dir, chance, marker: _json(step_dir / POLICY / "files.json", chance),
    "format": lambda step_dir, chance, marker: _json(step_dir / POLICY / "metadata.json", chance),
    "state": lambda step_dir, chance, marker: _json(step_dir / "state.json", chance),
    "list entry": _list_entry,
    "inner pickle": _inner_pickle,
    "common": _odd_common,
    "random state": _odd_random_state,
    "payload": _payload,
}

if __name__ == "__main__":
    from tests.mcore.damaged_run import main

    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 250))
