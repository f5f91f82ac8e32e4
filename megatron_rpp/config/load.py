"""Read the settings of a run: YAML files, then `section.name=value` from the command line, decoded strictly.

A file may start from others with `extends: base.yaml` (or a list; later ones win, then the file itself); sections merge,
lists and values replace. `preset: NAME` puts a paper's settings (presets.py) under all of them.

Paths of inputs (model.hf, model.ref, model.megatron_checkpoint, critic.hf, data.train, data.eval, sft.train) are relative to the file
that they are written in, so that an example runs from any directory; given on the command line they are relative to the working
directory, as a shell user expects. Paths of outputs (run.dir, sft.out) are always relative to the working directory. All are absolute
in the result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_rpp.config import load_yaml
from megatron_rpp.config.correction import from_old_names, without_other_parts
from megatron_rpp.config.load_decode import decode
from megatron_rpp.config.load_yaml import KeyPath
from megatron_rpp.config.presets import PRESETS
from megatron_rpp.config.problems import Problem
from megatron_rpp.config.schema import Config
from megatron_rpp.errors import ConfigError

COMMAND_LINE = "command line"
MAX_FILES = 32  # that one run.yaml may name with `extends`, directly or not
_INPUTS = (("model", "hf"), ("model", "ref"), ("model", "megatron_checkpoint"), ("critic", "hf"))
_INPUTS += (("data", "train"), ("data", "eval"), ("sft", "train"))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file `path` with `overrides` such as "optim.lr=1e-6" applied in order.

    Raises: ConfigError that names every mistake with its file and line.
    """
    return load_with_lines(path, overrides)[0]


def load_with_lines(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """As `load`, and for each dotted setting that somebody wrote, where: file:line or `command line`."""
    path = Path(path)
    tree, lines = _read_with_bases(path, (), [])
    for override in overrides:
        _apply(override, tree, lines)
    tree, problems = _over_preset(tree, lines)
    cfg = decode(tree, lines, source=str(path), problems=problems)
    cwd = Path.cwd()
    run = replace(cfg.run, dir=_absolute(cfg.run.dir, cwd))
    sft = replace(cfg.sft, out=None if cfg.sft.out is None else _absolute(cfg.sft.out, cwd))
    return replace(cfg, run=run, sft=sft), {".".join(written): line for written, line in lines.items()}


def dump(cfg: Config) -> str:
    """The configuration as YAML with every setting written out; `load` of that text gives an equal `Config`."""
    return load_yaml.write(_plain(asdict(cfg)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read_with_bases(path: Path, users: tuple[Path, ...], read: list[Path]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The merged tree of a file and its bases, with input paths already made absolute.

    users: the files whose `extends` led here.
    read: all files read so far; this one and its bases are added.
    """
    document = load_yaml.read(path)
    real = Path(os.path.realpath(path))
    if real in users:
        chain = " -> ".join(str(user) for user in (*users, real))
        raise ConfigError("`extends` goes round in a circle", where=str(path), got=chain)
    read.append(real)
    if len(read) > MAX_FILES:
        fix = "merge some of the files"
        raise ConfigError("`extends` leads to too many files", where=str(path), expected=f"at most {MAX_FILES}", fix=fix)
    own = {} if document.value is None else document.value
    if not isinstance(own, dict):
        raise ConfigError("the settings must be sections of `name: value` lines", where=str(path), got=type(own).__name__)
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    # A section with every line commented out is there all the same; a preset that is null is none.
    own = {name: {} if section is None and name != "preset" else section for name, section in own.items()}
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError("`extends` must be a file name or a list of file names", where=document.lines[("extends",)], got=repr(bases))
    for section, name in _INPUTS:
        if isinstance(own.get(section), dict) and isinstance(own[section].get(name), str):
            own[section][name] = str(_absolute(Path(own[section][name]), real.parent))
    tree: dict[str, Any] = {}
    lines: dict[KeyPath, str] = {}
    for base in bases:
        below, below_lines = _read_with_bases(real.parent / base, (*users, real), read)
        tree = _merge(tree, below)
        lines |= below_lines
    return _merge(tree, own), lines | document.lines


def _over_preset(tree: dict[str, Any], lines: dict[KeyPath, str]) -> tuple[dict[str, Any], list[Problem]]:
    """The settings with those of the preset, where one is named, under them. An unknown name is left for decode to explain.

    Replaces old names of settings with the current ones. Returns the problems with the old names.
    """
    name = tree.get("preset")
    below = dict(PRESETS.get(name, {})) if isinstance(name, str) else {}
    problems: list[Problem] = []
    own = tree.get("correction")
    if isinstance(own, dict):
        own, problems = from_old_names(own, below.get("correction", {}), lines)
        tree = tree | {"correction": own}
        if "correction" in below:
            below["correction"] = without_other_parts(below["correction"], own)
    for section, values in below.items():
        for setting in values:
            lines.setdefault((section, setting), f"preset {name}")
    return _merge(below, tree), problems


def _absolute(path: Path, start: Path) -> Path:
    """`path` from `start`, with `~` and `..` worked out but links left alone: a link to a data set may move on purpose."""
    return Path(os.path.normpath(start.absolute() / os.path.expanduser(path)))


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(merged.get(name), dict) and isinstance(value, dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _apply(override: str, tree: dict[str, Any], lines: dict[KeyPath, str]) -> None:
    dotted, equals, text = override.partition("=")
    *sections, name = path = tuple(dotted.split("."))  # only `preset` stands in no section
    if not (equals and all(path) and (sections or name == "preset") and len(path) <= load_yaml.MAX_DEPTH):
        expected = "section.name=value, e.g. optim.lr=1e-6"
        raise ConfigError("cannot read an override", where=COMMAND_LINE, expected=expected, got=repr(override))
    value = load_yaml.parse(text, f"{COMMAND_LINE}, {dotted}").value
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{section} has no settings of its own", where=COMMAND_LINE, got=repr(override))
    tree[name] = str(_absolute(Path(value), Path.cwd())) if path in _INPUTS and isinstance(value, str) else value
    for written in [written for written in lines if written[: len(path)] == path]:
        del lines[written]  # whatever the file said about this setting no longer counts
    lines[path] = COMMAND_LINE
