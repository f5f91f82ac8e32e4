"""Fingerprints of a library's source, read from its files: nothing of the library is imported or run."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron_rpp.errors import PatchError

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def fingerprint(path: str) -> str:
    """First 12 hex digits of the sha256 of the text of "pkg.mod", or of a class, function or assigned name in it.

    "pkg.mod:Class.fn" takes a definition with its decorators, also inside if and try; a name that is only assigned takes
    all statements that assign it. Raises: PatchError when there is no such source.
    """
    module, _, name = path.partition(":")
    file = module_file(module)
    if file is None:
        raise PatchError("no source file for this module", where=path, fix="is the library installed, is the name right?")
    text = _text(file) if not name else "".join(_find(file, name.split(".")))
    if not text:
        raise PatchError("nothing of this name is defined or assigned", where=path, expected=f"it in {file}", fix="correct the name")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def module_file(module: str) -> Path | None:
    """Where "pkg.mod" lives. Only the top package is looked up: finding a submodule the usual way would run its parents."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not parts:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        stem = Path(folder, *parts)
        for file in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if file.exists():
                return file
    return None


@functools.cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(_text(file))


def _find(file: Path, names: list[str]) -> Iterator[str]:
    lines = _text(file).splitlines(keepends=True)
    scope: ast.AST = _tree(file)
    for name in names[:-1]:
        scope = next((node for node in _statements(scope) if isinstance(node, ast.ClassDef) and node.name == name), ast.Module([], []))
    found = [node for node in _statements(scope) if isinstance(node, Definition) and node.name == names[-1]]
    for node in found or [node for node in _statements(scope) if _assigns(node, names[-1])]:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        yield "".join(lines[first - 1 : node.end_lineno])


def _statements(scope: ast.AST) -> Iterator[ast.stmt]:
    """Statements of one scope in order, through if, try and with, not into definitions."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, Definition | ast.Lambda):
            yield from _statements(node)


def _assigns(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(part, ast.Name) and part.id == name for target in targets for part in ast.walk(target))
