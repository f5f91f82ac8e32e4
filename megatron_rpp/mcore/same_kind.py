"""Whether what a checkpoint says beside its tensors is of the kind that this run would save. Pure."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_like(mine: Any, theirs: Any, path: str) -> None:
    """Raises ValueError naming an entry of `theirs` of another type than in `mine`: text for a number.

    mine: of this run, its shards included, which are not compared. Entries that only one of both has are
    left aside, except in parameter groups: an optimizer takes a group as it is, and has defaults for
    switches only.
    """
    if isinstance(mine, dict):
        if not isinstance(theirs, dict):
            raise ValueError(f"{path} is of type {type(theirs).__name__}, not dict")
        for key in mine.keys() & theirs.keys() - {"params"}:  # numbers of parameters, which a layout decides
            check_like(mine[key], theirs[key], f"{path}.{key}")
    elif isinstance(mine, list | tuple) and mine and isinstance(mine[0], dict | int | float):
        _check_list(mine, theirs, path)
    elif mine is None:
        # An option that is not set here may be set there, to something as plain.
        if theirs is not None and not isinstance(theirs, bool | int | float | str):
            raise ValueError(f"{path} is of type {type(theirs).__name__}, not a number or text")
    elif _kind(mine) is not None and _kind(theirs) != _kind(mine):
        raise ValueError(f"{path} is of type {type(theirs).__name__}, not {type(mine).__name__}")


def _check_list(mine: list[Any] | tuple[Any, ...], theirs: Any, path: str) -> None:
    are_groups = isinstance(mine[0], dict)
    if not isinstance(theirs, list | tuple) or (not theirs and not are_groups):
        raise ValueError(f"{path} is of type {type(theirs).__name__}, not a list like {mine}"[:200])
    for index, one in enumerate(theirs):
        check_like(mine[0], one, f"{path}[{index}]")
        for key, value in mine[0].items() if are_groups else ():
            if key not in one and key not in ("params", "step") and not (value is None or isinstance(value, bool)):
                raise ValueError(f"{path}[{index}] has no {key}")


def _kind(value: Any) -> str | None:
    """None for what is not compared: a shard has no value yet."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else None
