"""Docstrings of the parts whose mathematics or contracts a reader must be able to check without reading the body."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.guards.source import PACKAGE, name_of, python_files, tree_of

PARTS = ("algo", "stats", "dist", "weights", "mcore")
MATHEMATICS = ("algo", "stats")
# Modules of one family each implement the same two functions, which weights/families/registry.py describes.
FAMILY = PACKAGE / "weights" / "families"
FAMILY_FUNCTIONS = {"describe", "layer"}
_SHAPE = re.compile(r"\[[^\]]*\b[TSPGV][\w +*/-]*\]|\[\]|Shapes?:|_[TSPGV]+1?\b|scalar")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> Iterator[Definition]:
    return (node for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_"))


def files_of(*parts: str) -> list[Path]:
    return [path for part in parts for path in python_files(f"megatron_rpp/{part}")]


def is_family_function(path: Path, node: Definition) -> bool:
    return path.parent == FAMILY and node.name in FAMILY_FUNCTIONS


def missing(path: Path, tree: ast.Module) -> Iterator[str]:
    """Public functions and classes without a docstring, and those whose docstring leaves out an error that their body raises."""
    for node in public(tree):
        text = ast.get_docstring(node)
        if text is None:
            if not is_family_function(path, node):
                yield f"{name_of(path)}:{node.lineno} {node.name}: no docstring"
            continue
        if isinstance(node, ast.ClassDef):
            continue
        raised = {name for name in raises(node) if name not in text}
        if raised and not re.search(r"`\w+`", text):  # unless it says that its contract is that of another function
            yield f"{name_of(path)}:{node.lineno} {node.name}: Raises lacks {', '.join(sorted(raised))}"


def raises(node: ast.AST) -> set[str]:
    """Names of the error classes that a body raises by a call; re-raised and handed-over errors have no name here."""
    calls = [one.exc for one in ast.walk(node) if isinstance(one, ast.Raise) and isinstance(one.exc, ast.Call)]
    return {name for call in calls if (name := ast.unparse(call.func)).endswith("Error")}


def without_shapes(path: Path, tree: ast.Module) -> Iterator[str]:
    """Public functions on tensors that name no shape, neither in the docstring nor by the suffixes of their parameters."""
    for node in public(tree):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.args, *node.args.kwonlyargs]
        tensors = [argument for argument in arguments if argument.annotation and "Tensor" in ast.unparse(argument.annotation)]
        named = " ".join([ast.get_docstring(node) or "", *(argument.arg for argument in tensors)])
        if tensors and not _SHAPE.search(named):
            yield f"{name_of(path)}:{node.lineno} {node.name}"


def test_public_functions_say_what_they_do_and_which_errors_they_raise() -> None:
    assert [wrong for path in files_of(*PARTS) for wrong in missing(path, tree_of(path))] == []


def test_functions_on_tensors_say_their_shapes() -> None:
    assert [wrong for path in files_of(*MATHEMATICS) for wrong in without_shapes(path, tree_of(path))] == []


def test_every_module_says_what_it_is_for() -> None:
    bare = [
        name_of(path)
        for path in python_files("megatron_rpp", "patches", "tools")
        if path.stat().st_size and not ast.get_docstring(tree_of(path))
    ]
    assert bare == []


def test_formulas_name_their_source() -> None:
    """Where a paper defines a quantity, its module names the paper; sequences.py and mismatch.py hold no formula of a paper."""
    own = {"__init__.py", "sequences.py", "mismatch.py"}
    assert [name_of(path) for path in files_of("algo") if path.name not in own and not re.search(r"arXiv|Source:", path.read_text())] == []


def test_planted_gaps_are_found() -> None:
    path = PACKAGE / "algo" / "made_up.py"
    code = """
def no_docstring(): ...
def silent(x):
    '''Says nothing of errors.'''
    raise ConfigError("bad")
def honest(x):
    '''Raises: ConfigError.'''
    raise ConfigError("bad")
def delegating(x):
    '''As `honest`.'''
    raise ConfigError("bad")
def _private(): ...
def shapeless(x: Tensor) -> Tensor:
    '''Twice x.'''
def suffixed(x_T: Tensor) -> Tensor:
    '''Twice x.'''
def stated(x: Tensor) -> Tensor:
    '''Shapes: [T] -> [T].'''
"""
    tree = ast.parse(code)
    assert [wrong.partition(" ")[2] for wrong in missing(path, tree)] == ["no_docstring: no docstring", "silent: Raises lacks ConfigError"]
    assert [wrong.partition(" ")[2] for wrong in without_shapes(path, tree)] == ["shapeless"]
