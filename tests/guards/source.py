"""What the guards look at: the project's own files, parsed once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_rpp"
FOLDERS = ("megatron_rpp", "patches", "tests", "tools", "examples", "docs", "requirements", ".ci")
TEXT = {".py", ".md", ".sh", ".sbatch", ".yaml", ".toml", ".txt", ".cfg"}


@cache
def text_files() -> tuple[Path, ...]:
    """Every file that a person wrote as text, in order; caches and whatever a run has written are left out."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files = [path for path in (*inside, *ROOT.iterdir()) if path.is_file() and (path.suffix in TEXT or path.name in ("run", "LICENSE"))]
    return tuple(sorted(path for path in files if "__pycache__" not in path.parts))


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """The Python files of the project, or of some of its folders."""
    chosen = [ROOT / folder for folder in folders]
    return tuple(path for path in text_files() if path.suffix == ".py" and (not chosen or any(folder in path.parents for folder in chosen)))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """Each imported module or name as (line, dotted name): `from a import b` gives a.b, for b may be a module."""
    nodes = ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
