"""Applying, undoing, verifying and reporting patches.

`apply` imports nothing of the library: it compares version and source files with the locks, then waits for each target's
module. When that module has run, and before any importer can bind a name from it, the slot is set. Children started by
multiprocessing do the same before their first import; they take over what their parent found out about host and files.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_rpp_patches._imports import ImportWatcher, Inheritance, die_with_parent
from megatron_rpp_patches._record import MISSING, Patch, check_source, check_version, current, slot

WATCHER = ImportWatcher()


@dataclass
class _Entry:
    """What became of one patch in this process."""

    patch: Patch
    reason: str | None  # why it is inactive; None when it is wanted
    hash: str  # of the locked source; "" when there is none or the patch is inactive
    role: str
    active: bool = False
    original: Any = None
    replacement: Any = None
    was_own: bool = True  # the owner itself held the name, it was not inherited

    def on_import(self, module: ModuleType) -> None:
        """Set the slot. Also called for a reload, which brought the original back."""
        patch = self.patch
        owner, name = slot(patch.target)
        self.original = current(patch.target)
        if patch.source is None:
            _check_origin(patch, self.original, module)
        self.was_own = name in vars(owner)
        self.replacement = patch.make(self.original)
        if patch.kind == "wrap":
            self.replacement.__wrapped__ = self.original
        if patch.kind != "value":
            self.replacement.__rpp_patch__ = patch.id
            _rebind(patch.module, self.original, self.replacement)
        setattr(owner, name, self.replacement)
        self.active = True

    def enable(self) -> None:
        if self.patch.kind == "hook":
            self.patch.enable()
            self.active = True
        else:
            WATCHER.watch(self.patch.module, self.on_import)

    def disable(self) -> None:
        WATCHER.forget(self.on_import)
        if self.active and self.patch.kind == "hook":
            self.patch.disable()
        elif self.active:
            self._restore()
        self.active = False

    def _restore(self) -> None:
        owner, name = slot(self.patch.target)
        if self.was_own and self.original is not MISSING:
            setattr(owner, name, self.original)
        else:
            delattr(owner, name)
        if self.patch.kind != "value":
            _rebind(self.patch.module, self.replacement, self.original)

    def check(self) -> None:
        """Raise PatchError unless the patch stands where it was put."""
        if self.patch.kind == "hook":
            return
        importlib.import_module(self.patch.module)
        found = current(self.patch.target)
        if not self.active or found is not self.replacement:
            fix = "apply before the import, and let nothing else set this name"
            raise self.patch.refuse("the patch is not in place", expected=self.replacement, got=found, fix=fix)

    def row(self) -> dict[str, Any]:
        """One line of the report."""
        reason = self.reason
        if reason is None and not self.active:
            reason = f"{self.patch.module} is not imported yet"
        return {
            "id": self.patch.id,
            "target": self.patch.target,
            "active": self.active,
            "hash": self.hash,
            "pid": os.getpid(),
            "role": self.role,
            "reason": reason,
        }


Found = tuple[str | None, str]
_ENTRIES: dict[str, dict[str, _Entry]] = {}  # set name -> patch id -> entry, in the order applied


def patches_of(name: str) -> tuple[Patch, ...]:
    """The PATCHES of one set, such as "megatron_core"."""
    return importlib.import_module(f"megatron_rpp_patches.{name}").PATCHES


def apply(name: str, *, role: str | None = None, children: bool = True, found: dict[str, Found] | None = None) -> None:
    """Arm one set of patches in this process and, with children, in every process multiprocessing starts from it.

    Call it before the library is imported. A second call changes nothing but the role.
    role: how the report names this process; None takes multiprocessing's name for it.
    found: what a parent found out, by patch id; None looks for oneself.
    Raises: PatchError for a version or a source that nobody reviewed.
    """
    if name in _ENTRIES:
        for entry in _ENTRIES[name].values():
            entry.role = role or entry.role
        return
    role = role or multiprocessing.current_process().name
    patches = patches_of(name)
    if found is None:
        found = {patch.id: _look(patch) for patch in patches}
    entries = {patch.id: _Entry(patch, *found[patch.id], role) for patch in patches}
    _ENTRIES[name] = entries
    try:
        for entry in entries.values():
            if entry.reason is None:
                entry.enable()
    except BaseException:
        undo(name)
        raise
    if children:
        Inheritance("megatron_rpp_patches._core:apply_inherited", (name, found)).register(f"megatron_rpp_patches.{name}")


def apply_inherited(name: str, found: dict[str, Found]) -> None:
    """`apply` as a child process calls it, with what its parent found out about host and files.

    The child dies with the thread that started it: the helper process that a Megatron checkpoint keeps for its queue would
    otherwise outlive a rank that was killed, for ever.
    """
    apply(name, found=found)
    if name == "megatron_core":
        die_with_parent()


def _look(patch: Patch) -> Found:
    """The inactive reason, or None, and the hash of the source, for a patch that is wanted."""
    reason = patch.inactive()
    if reason is not None:
        return reason, ""
    check_version(patch)
    return None, check_source(patch)


def undo(name: str) -> None:
    """Put every original back, also where other modules had bound the replacement, and stop watching imports."""
    for entry in reversed(_ENTRIES.pop(name, {}).values()):
        entry.disable()
    Inheritance.withdraw(f"megatron_rpp_patches.{name}")


def verify(name: str, *, probe: bool = True) -> list[dict[str, Any]]:
    """Import every target, check that each wanted patch stands, run its probe; the report of this set.

    Raises: PatchError when the set was not applied, a slot holds something else, or a probe fails.
    """
    if name not in _ENTRIES:
        for patch in patches_of(name):
            raise patch.refuse("the set was never applied", expected=f'apply("{name}")', got="nothing", fix=f'call apply("{name}") first')
    for entry in _ENTRIES[name].values():
        if entry.reason is not None:
            continue
        entry.check()
        if probe:
            _run_probe(entry.patch)
    return report(name)


def report(name: str | None = None) -> list[dict[str, Any]]:
    """One dict for each patch of one set, or of all that were applied: id target active hash pid role reason."""
    return [entry.row() for each, entries in _ENTRIES.items() if name in (None, each) for entry in entries.values()]


def _run_probe(patch: Patch) -> None:
    try:
        patch.probe()
    except AssertionError as error:
        raise patch.refuse("the probe fails", expected="the patched behaviour", got=error, fix=f"run {patch.test}") from error


def _check_origin(patch: Patch, original: Any, module: ModuleType) -> None:
    """Refuse a function that somebody else has put there: it is not the one whose source was compared."""
    code = getattr(inspect.unwrap(getattr(original, "__func__", original)), "__code__", None) if callable(original) else None
    if code is not None and code.co_filename != module.__file__:
        fix = "let nothing else set this name before us, or name the module that defines it in `target`"
        raise patch.refuse("the target was not defined in its module", expected=module.__file__, got=code.co_filename, fix=fix)


def _rebind(module: str, old: Any, new: Any) -> None:
    """Point names that `from module import name` bound before the slot was set at the new object."""
    if old is MISSING or new is MISSING:
        return
    root = module.partition(".")[0]
    for name, other in list(sys.modules.items()):
        if isinstance(other, ModuleType) and (name == root or name.startswith(root + ".")):
            for key in [key for key, value in list(vars(other).items()) if value is old]:
                setattr(other, key, new)


def all_patches(names: Iterable[str]) -> tuple[Patch, ...]:
    """The patches of several sets, in order; one that is in two sets comes once."""
    return tuple({patch.id: patch for name in names for patch in patches_of(name)}.values())
