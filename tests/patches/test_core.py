"""Applying, refusing, undoing and reporting, on a small library made for the purpose."""

from __future__ import annotations

import datetime
import importlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_rpp_patches
from megatron_rpp.errors import PatchError
from megatron_rpp_patches import Patch, _core, _record
from megatron_rpp_patches._source import fingerprint

NUMBERS = itertools.count()
MODULE_A = """
FLAG = False
if True:
    LIMIT = 3

def f(x):
    return x + 1

class C:
    @staticmethod
    def s():
        return "s"

    def m(self):
        return "m"

class D(C):
    pass
"""


class Library:
    """A library of one's own, its lock file, and the set of patches "fake" for it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = f"fakelib{next(NUMBERS)}"  # a new name each time: sources are read once in a process
        self.locks, self.root, self._monkeypatch = root / "locks", root, monkeypatch
        self.locks.mkdir()
        package = root / self.name
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "a.py").write_text(MODULE_A)
        (package / "b.py").write_text(f"from {self.name}.a import f\n")
        info = root / f"{self.name}-1.2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.name}\nVersion: 1.2.0+local\n")
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.setattr(_record, "LOCKS", self.locks)

    def module(self, name: str) -> types.ModuleType:
        return importlib.import_module(f"{self.name}.{name}")

    def lock(self, text: str, version: str = "1.2.0") -> None:
        (self.locks / f"{self.name}-{version}.toml").write_text(text)

    def patch(self, target: str = "a:f", *, kind: str = "wrap", is_locked: bool = True, **changes: Any) -> Patch:
        full = f"{self.name}.{target}"
        if is_locked and kind != "hook":
            path = self.locks / f"{self.name}-1.2.0.toml"
            path.write_text((path.read_text() if path.exists() else "") + f'"{full}" = "{fingerprint(full)}"\n')
        record = {
            "id": "p900-fake",
            "library": self.name,
            "target": full,
            "kind": kind,
            "why": "a test",
            "upstream": "none",
            "versions": ">=1.2,<1.3",
            "remove_when": "never",
            "expires": datetime.date(2100, 1, 1),
            "probe": lambda: None,
            "test": "here",
            "make": None if kind == "hook" else plus_ten,
        }
        return Patch(**{**record, **changes})

    def provide(self, *patches: Patch) -> None:
        fake = types.ModuleType("megatron_rpp_patches.fake")
        fake.PATCHES = patches
        self._monkeypatch.setitem(sys.modules, fake.__name__, fake)


def plus_ten(original: Callable) -> Callable:
    return lambda *args: original(*args) + 10


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    library = Library(tmp_path, monkeypatch)
    yield library
    megatron_rpp_patches.undo("fake")
    for name in [name for name in sys.modules if name.split(".")[0] == library.name]:
        del sys.modules[name]


def test_a_patch_takes_effect_when_its_module_is_imported_and_before_others_bind_from_it(library: Library) -> None:
    library.provide(library.patch())
    megatron_rpp_patches.apply("fake")
    assert f"{library.name}.a" not in sys.modules, "apply imports nothing"
    assert library.module("b").f(1) == 12
    assert library.module("a").f.__rpp_patch__ == "p900-fake"
    assert library.module("a").f.__wrapped__(1) == 2


def test_a_late_patch_reaches_names_that_were_bound_already(library: Library) -> None:
    library.provide(library.patch())
    bound = library.module("b")
    megatron_rpp_patches.apply("fake")
    assert bound.f(1) == 12


@pytest.mark.parametrize("target", ["a:f", "a:C.m", "a:C.s", "a:D.m"])
def test_undo_leaves_every_original_identical(library: Library, target: str) -> None:
    owner = library.module("a")
    for name in target.partition(":")[2].split(".")[:-1]:
        owner = getattr(owner, name)
    before, bound = dict(vars(owner)), library.module("b").f
    kind = "replace" if target == "a:C.s" else "wrap"
    source = f"{library.name}.a:C.m" if target == "a:D.m" else None
    patch = library.patch("a:C.m" if source else target, kind=kind)
    library.provide(library.patch(target, kind=kind, is_locked=False, source=source) if source else patch)
    megatron_rpp_patches.apply("fake")
    assert dict(vars(owner)) != before
    megatron_rpp_patches.undo("fake")
    after = dict(vars(owner))
    assert {name: id(value) for name, value in after.items()} == {name: id(value) for name, value in before.items()}
    assert library.module("b").f is bound
    assert _core.WATCHER not in sys.meta_path or _core.WATCHER._callbacks, "an idle finder leaves sys.meta_path"


def test_applying_twice_wraps_once(library: Library) -> None:
    library.provide(library.patch())
    megatron_rpp_patches.apply("fake")
    megatron_rpp_patches.apply("fake")
    assert library.module("a").f(1) == 12


def test_a_reloaded_module_is_patched_again(library: Library) -> None:
    library.provide(library.patch())
    megatron_rpp_patches.apply("fake")
    importlib.reload(library.module("a"))
    assert library.module("a").f(1) == 12
    megatron_rpp_patches.verify("fake")


def test_a_version_outside_the_specifier_is_refused(library: Library) -> None:
    library.provide(library.patch(versions=">=1.3"))
    with pytest.raises(PatchError) as error:
        megatron_rpp_patches.apply("fake")
    message = str(error.value)
    assert all(part in message for part in ("p900-fake", f"{library.name}.a:f", ">=1.3", "1.2.0", "install")), message
    assert library.module("a").f(1) == 2
    assert not megatron_rpp_patches.report("fake")


def test_a_version_without_a_lock_is_refused(library: Library) -> None:
    library.provide(library.patch(is_locked=False))
    with pytest.raises(PatchError, match=rf"p900-fake.*never reviewed[\s\S]*{library.name}-1.2.0.toml[\s\S]*no lock file[\s\S]*lock"):
        megatron_rpp_patches.apply("fake")
    library.lock('"something.else:f" = "0"\n')
    with pytest.raises(PatchError, match="no entry"):
        megatron_rpp_patches.apply("fake")


def test_a_changed_source_is_refused_before_anything_is_imported(library: Library) -> None:
    patch = library.patch(is_locked=False)
    library.lock(f'"{patch.target}" = "123456789abc"\n')
    library.provide(patch)
    with pytest.raises(
        PatchError, match=rf"p900-fake[\s\S]*not the one that was reviewed[\s\S]*123456789abc[\s\S]*{fingerprint(patch.target)}"
    ):
        megatron_rpp_patches.apply("fake")
    assert f"{library.name}.a" not in sys.modules


def test_a_target_that_somebody_else_replaced_is_refused(library: Library) -> None:
    library.provide(library.patch())
    library.module("a").f = lambda x: x
    with pytest.raises(PatchError, match="not defined in its module"):
        megatron_rpp_patches.apply("fake")
    assert not megatron_rpp_patches.report("fake"), "a set that was refused is not half applied"


def test_verify_finds_a_patch_that_was_overwritten(library: Library) -> None:
    library.provide(library.patch())
    megatron_rpp_patches.apply("fake")
    megatron_rpp_patches.verify("fake")
    library.module("a").f = len
    with pytest.raises(PatchError, match="not in place"):
        megatron_rpp_patches.verify("fake")


def test_verify_runs_the_probe_and_names_the_patch_when_it_fails(library: Library) -> None:
    def probe() -> None:
        assert library.module("a").f(1) == 13, "thirteen"

    library.provide(library.patch(probe=probe))
    megatron_rpp_patches.apply("fake")
    with pytest.raises(PatchError, match=r"p900-fake: the probe fails[\s\S]*thirteen"):
        megatron_rpp_patches.verify("fake")
    assert megatron_rpp_patches.verify("fake", probe=False)[0]["active"]


def test_verify_refuses_a_set_that_was_never_applied(library: Library) -> None:
    library.provide(library.patch())
    with pytest.raises(PatchError, match="never applied"):
        megatron_rpp_patches.verify("fake")


def test_an_inactive_patch_is_not_checked_and_says_why(library: Library) -> None:
    library.provide(library.patch(versions="==9.9", is_locked=False, inactive=lambda: "a device is present"))
    megatron_rpp_patches.apply("fake", role="trainer")
    assert library.module("a").f(1) == 2
    (row,) = megatron_rpp_patches.verify("fake")
    assert (row["active"], row["reason"], row["role"], row["hash"]) == (False, "a device is present", "trainer", "")


def test_a_child_that_inherited_the_patches_can_name_its_role(library: Library) -> None:
    library.provide(library.patch())
    megatron_rpp_patches.apply("fake")
    megatron_rpp_patches.apply("fake", role="server")
    megatron_rpp_patches.apply("fake")
    assert megatron_rpp_patches.report("fake")[0]["role"] == "server"


def test_the_report_tells_armed_from_active(library: Library) -> None:
    patch = library.patch()
    library.provide(patch)
    megatron_rpp_patches.apply("fake")
    (row,) = megatron_rpp_patches.report("fake")
    assert (row["active"], row["reason"]) == (False, f"{library.name}.a is not imported yet")
    library.module("a")
    (row,) = megatron_rpp_patches.report("fake")
    assert (row["id"], row["target"], row["active"], row["reason"]) == ("p900-fake", patch.target, True, None)
    assert row["hash"] == fingerprint(patch.target)


def test_a_value_is_locked_by_the_statements_that_assign_it(library: Library) -> None:
    library.provide(library.patch("a:FLAG", kind="value", make=lambda old: not old))
    megatron_rpp_patches.apply("fake")
    assert library.module("a").FLAG is True
    megatron_rpp_patches.undo("fake")
    assert library.module("a").FLAG is False
    assert fingerprint(f"{library.name}.a:LIMIT") != fingerprint(f"{library.name}.a:FLAG")


def test_a_name_that_was_not_there_is_gone_after_undo(library: Library) -> None:
    patch = library.patch()
    library.provide(library.patch("a:EXTRA", kind="value", is_locked=False, source=patch.target, make=lambda old: repr(old)))
    megatron_rpp_patches.apply("fake")
    assert library.module("a").EXTRA == "<not there>"
    megatron_rpp_patches.undo("fake")
    assert not hasattr(library.module("a"), "EXTRA")


def test_a_hook_is_enabled_and_disabled_without_a_lock(library: Library) -> None:
    calls: list[str] = []
    library.provide(library.patch(kind="hook", enable=lambda: calls.append("on"), disable=lambda: calls.append("off")))
    megatron_rpp_patches.apply("fake")
    assert megatron_rpp_patches.report("fake")[0]["active"]
    megatron_rpp_patches.undo("fake")
    assert calls == ["on", "off"]


def test_when_one_patch_refuses_the_others_are_taken_back(library: Library) -> None:
    def refuse() -> None:
        raise PatchError("no")

    calls: list[str] = []
    first = library.patch(kind="hook", enable=lambda: calls.append("on"), disable=lambda: calls.append("off"))
    second = library.patch(kind="hook", id="p901-fake", enable=refuse, disable=lambda: calls.append("never"))
    library.provide(first, second)
    with pytest.raises(PatchError):
        megatron_rpp_patches.apply("fake")
    assert calls == ["on", "off"]


@pytest.mark.parametrize(
    ("specifier", "version", "expected"),
    [
        ("==0.16.1", "0.16.1", True),
        ("==0.16.1", "0.16.10", False),
        ("==1.2", "1.2.0", True),
        (">=0.9,<0.17", "0.16.1", True),
        (">=0.9,<0.16", "0.16.0", False),
        ("!=2.0", "2.0", False),
        ("==2.0", "2.0rc1", False),
    ],
)
def test_version_specifiers_compare_numbers_not_text(specifier: str, version: str, expected: bool) -> None:
    assert _record.version_matches(specifier, version) is expected


@pytest.mark.parametrize("specifier", ["", "1.2", "~=1.2", ">=1.2 <2"])
def test_a_specifier_that_cannot_be_read_is_an_error(specifier: str) -> None:
    with pytest.raises(PatchError, match="not a version specifier"):
        _record.version_matches(specifier, "1.2")


def test_a_record_without_what_its_kind_needs_is_refused(library: Library) -> None:
    with pytest.raises(PatchError, match="a hook has enable and disable"):
        library.patch(kind="wrap", make=None)
    with pytest.raises(PatchError, match="a hook has enable and disable"):
        library.patch(kind="hook", enable=lambda: None)


def test_a_fingerprint_covers_decorators_and_nothing_else(library: Library) -> None:
    name = f"{library.name}.a"
    before = fingerprint(f"{name}:C.s")
    other = Library.__new__(Library)
    other.name = f"fakelib{next(NUMBERS)}"
    (library.root / other.name).mkdir()
    (library.root / other.name / "a.py").write_text("x = 1\n" + MODULE_A.replace('return "m"', 'return "changed"'))
    (library.root / other.name / "__init__.py").write_text("")
    assert fingerprint(f"{other.name}.a:C.s") == before
    assert fingerprint(f"{other.name}.a:C.m") != fingerprint(f"{name}:C.m")
    assert fingerprint(f"{other.name}.a") != fingerprint(name)
    with pytest.raises(PatchError, match="nothing of this name"):
        fingerprint(f"{name}:missing")
    with pytest.raises(PatchError, match="no source file"):
        fingerprint(f"{library.name}.missing:f")
