"""Rewards by name, or by import path `package.module:function`."""

from __future__ import annotations

import difflib
import importlib

from megatron_rpp.errors import RewardError
from megatron_rpp.reward.base import RewardFn

REWARDS = {
    "exact": "megatron_rpp.reward.exact:score",
    "arithmetic": "megatron_rpp.reward.arithmetic:score",
    "math": "megatron_rpp.reward.math:score",
}


def get(name: str) -> RewardFn:
    """The reward function of that name. Imports it, so its dependencies load in the calling process.

    Raises: RewardError for an unknown name, a module that does not import, or a path that names no function.
    """
    module_name, _, function_name = _path_of(name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does on import is a fact to report
        got = f"{type(error).__name__}: {error}"
        raise RewardError(f"module {module_name!r} does not import", where=f"reward.name={name}", got=got, fix=_fix_of(error)) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, [key for key, value in vars(module).items() if callable(value)], n=1)
        raise RewardError(
            f"module {module_name!r} has no function {function_name!r}",
            where=f"reward.name={name}",
            fix=f"did you mean {module_name}:{near[0]}?" if near else f"define `def {function_name}(item: RewardInput) -> float` there",
        )
    return function


def _path_of(name: str) -> str:
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if colon and module_name and function_name.isidentifier():
        return name
    near = difflib.get_close_matches(name, REWARDS, n=1)
    raise RewardError(
        f"unknown reward {name!r}",
        where="reward.name",
        expected=f"one of {', '.join(REWARDS)}, or package.module:function",
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


def _fix_of(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name!r}, or put its folder on PYTHONPATH"
    return "import the module in a Python shell to see the whole traceback"
