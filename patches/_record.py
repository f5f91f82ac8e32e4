"""What a patch is: a frozen record, the place it changes, and the lock that says which source it was reviewed against."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import inspect
import operator
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rpp.errors import PatchError
from megatron_rpp_patches._source import fingerprint

Kind = Literal["wrap", "replace", "value", "hook"]
LOCKS = Path(__file__).parent / "locks"
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "<not there>", "__slots__": ()})()
_CLAUSE = re.compile(r"\s*(==|!=|>=|<=|<|>)\s*([0-9.]+)\s*$")
_OPERATORS = {"==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One change to one library, with everything needed to judge, check and delete it.

    id: "p010-noun", unique. library: name of the distribution on PyPI.
    target: "pkg.mod:Class.name", the slot that is set. For kind "hook" it only says what is touched.
    kind: wrap (calls the original), replace (does not), value (a plain object), hook (`enable` and `disable` do it all).
    make: original -> what takes its place; called when the target's module is imported.
    source: "pkg.mod:name" or "pkg.mod" whose text is locked, where that is not the target's own.
    inactive: why this process does not need the patch, or None when it does. Asked once, in `apply`.
    probe: a small call that raises AssertionError unless the patched behaviour is there.
    test: "file::name" of the necessity test, the one that is red without the patch.
    """

    id: str
    library: str
    target: str
    kind: Kind
    why: str
    upstream: str
    versions: str
    remove_when: str
    expires: datetime.date
    probe: Callable[[], None]
    test: str
    make: Callable[[Any], Any] | None = None
    enable: Callable[[], None] | None = None
    disable: Callable[[], None] | None = None
    source: str | None = None
    inactive: Callable[[], str | None] = lambda: None

    def __post_init__(self) -> None:
        is_hook = self.kind == "hook"
        if is_hook != (self.make is None) or is_hook != (self.enable is not None) or is_hook != (self.disable is not None):
            raise PatchError(
                "a hook has enable and disable, every other kind has make", where=self.id, got=self.kind, fix="complete the record"
            )

    @property
    def module(self) -> str:
        """The module whose import brings the target into being."""
        return self.target.partition(":")[0]

    @property
    def locked(self) -> str | None:
        """The name whose source is locked; None for a hook that answers no single source."""
        return self.source if self.source or self.kind == "hook" else self.target

    def refuse(self, what: str, *, expected: object, got: object, fix: str) -> PatchError:
        """The error every refusal of this patch raises."""
        return PatchError(f"{what} (target {self.target})", where=f"patch {self.id}", expected=expected, got=got, fix=fix)


def installed_version(library: str) -> str | None:
    """Version of an installed distribution without its local part ("2.13.0+cpu" is 2.13.0), None when it is not installed."""
    try:
        return importlib.metadata.version(library).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def version_matches(specifier: str, version: str) -> bool:
    """Whether a version lies in a specifier such as ">=0.16,<0.17". Release segments only: a pre-release matches nothing."""

    def numbers(text: str) -> tuple[int, ...]:
        parts = [int(part) for part in text.split(".")]
        while len(parts) > 1 and parts[-1] == 0:
            parts.pop()
        return tuple(parts)

    clauses = [_CLAUSE.match(clause) for clause in specifier.split(",")]
    if not all(clauses):
        raise PatchError("not a version specifier", expected='">=1.2,<1.3"', got=specifier, fix="correct `versions` in the record")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
        return False
    return all(_OPERATORS[clause[1]](numbers(version), numbers(clause[2])) for clause in clauses if clause)


def slot(path: str) -> tuple[Any, str]:
    """The owner and the attribute name of "pkg.mod:Class.name"; the module is imported."""
    module, _, attributes = path.partition(":")
    owner = importlib.import_module(module)
    *parents, name = attributes.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def current(path: str) -> Any:
    """What stands in a slot now (descriptors unbound), or MISSING."""
    owner, name = slot(path)
    return inspect.getattr_static(owner, name, MISSING)


def lock_file(library: str, version: str) -> Path:
    """Where the reviewed fingerprints of one version of a library are kept."""
    return LOCKS / f"{library}-{version}.toml"


def read_lock(library: str, version: str) -> dict[str, str] | None:
    """Reviewed fingerprints by locked name; None when this version was never reviewed."""
    path = lock_file(library, version)
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_version(patch: Patch) -> None:
    """Refuse an unknown version or one without a lock. Imports nothing of the library. Raises: PatchError."""
    version = installed_version(patch.library)
    if version is None or not version_matches(patch.versions, version):
        raise patch.refuse(
            f"{patch.library} is not a version this patch was written for",
            expected=f"{patch.library} {patch.versions}",
            got=version or "not installed",
            fix=f"install {patch.library}{patch.versions}, or review the patch and widen `versions`",
        )
    lock = read_lock(patch.library, version)
    if patch.locked and (lock is None or patch.locked not in lock):
        raise patch.refuse(
            "the source was never reviewed for this version",
            expected=f"an entry for {patch.locked} in {lock_file(patch.library, version).name}",
            got="no lock file" if lock is None else "no entry",
            fix="read the source, then run python -m megatron_rpp_patches lock",
        )


def check_source(patch: Patch) -> str:
    """Fingerprint of the locked source, equal to the reviewed one; "" for a hook without one. Imports nothing. Raises: PatchError."""
    if patch.locked is None:
        return ""
    version = installed_version(patch.library)
    expected = (read_lock(patch.library, version or "") or {}).get(patch.locked)
    got = fingerprint(patch.locked)
    if got != expected:
        raise patch.refuse(
            f"the source of {patch.locked} is not the one that was reviewed",
            expected=expected,
            got=got,
            fix="read the new source, mend the patch, then run python -m megatron_rpp_patches lock",
        )
    return got
