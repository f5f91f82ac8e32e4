"""Acting when a module has been imported, in this process and in every process that multiprocessing starts from it."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing.process
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]
_PR_SET_PDEATHSIG = 1


class ImportWatcher:
    """A meta path finder that finds nothing itself: it lets the other finders work and calls back after a module has run.

    Code that ran while the module was being imported (decorators, defaults) is out of reach; every later use is not.
    """

    def __init__(self) -> None:
        self._callbacks: list[tuple[str, bool, Callback]] = []

    def watch(self, name: str, callback: Callback, *, subtree: bool = False) -> None:
        """Call back for one module, or with subtree for it and all below; at once for those that are already imported."""
        self._callbacks.append((name, subtree, callback))
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for module_name, module in list(sys.modules.items()):
            if self._matches(name, subtree, module_name) and not _is_running(module):
                callback(module)

    def forget(self, callback: Callback) -> None:
        """Stop calling back; the finder leaves sys.meta_path with its last callback."""
        self._callbacks = [entry for entry in self._callbacks if entry[2] != callback]
        if not self._callbacks and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Part of the import protocol."""
        if not any(self._matches(watched, subtree, name) for watched, subtree, _ in self._callbacks):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None:
            self._call_after(spec.loader)
        return spec

    def _call_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for watched, subtree, callback in list(self._callbacks):
                if self._matches(watched, subtree, module.__name__):
                    callback(module)

        loader.exec_module = exec_module  # on this spec's own loader, so inspect and pkgutil still see the real class

    @staticmethod
    def _matches(watched: str, subtree: bool, name: str) -> bool:
        return name == watched or (subtree and name.startswith(watched + "."))


def _is_running(module: ModuleType | None) -> bool:
    """A module that is still being imported is called back when it has finished."""
    return module is None or bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class Inheritance:
    """What a child process does first: call `function(*args)`, given as "pkg.mod:name".

    A Process copies the `_config` of the process that makes it, and spawn and forkserver pickle it ahead of the target,
    so unpickling is the one moment that comes before any import a child's target asks for. The same way serves the
    children's own children. Forked children have everything already.
    """

    def __init__(self, function: str, args: tuple) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return _inherit, (self.function, self.args)

    def register(self, key: str) -> None:
        """Give this to every process started from here on."""
        multiprocessing.process.current_process()._config[key] = self

    @staticmethod
    def withdraw(key: str) -> None:
        """Stop giving it."""
        multiprocessing.process.current_process()._config.pop(key, None)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _inherit(function: str, args: tuple) -> Inheritance:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*args)
    return Inheritance(function, args)
