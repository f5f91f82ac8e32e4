"""Size and shape of the source: small files, short functions, few parameters, nothing left for later."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.guards.source import ROOT, functions, name_of, python_files, text_files, tree_of

FILE_LINES, FUNCTION_LINES, POSITIONAL = 400, 60, 5

# A signature that a library dictates: what overrides Megatron's and SGLang's own methods, and torch.autograd.Function. And one row
# of a table of patches, whose columns stand in the order of the table.
DICTATED = {
    "megatron_rpp/mcore/vocab_logprob.py": {"forward"},
    "megatron_rpp/weights/quantise_triton.py": {"_quantise"},  # what a kernel is given, it is given as arguments
    "megatron_rpp/rollout/cpu_attention.py": {"_run_sdpa_forward_decode"},
    "patches/megatron_core/spec/attention.py": {"__init__", "forward", "_whole"},
    "patches/megatron_core/p080_spec.py": {"_patch"},
    "patches/sglang/p110_noise_by_vocabulary.py": {"top_k_top_p_min_p_sampling_from_probs_torch"},
}
# Where any exception at all is caught on purpose: whatever a user's verifier, or the engine, raises is data there.
CATCH_ALL = {
    "megatron_rpp/reward/registry.py",
    "megatron_rpp/reward/worker.py",
    "megatron_rpp/rollout/hook.py",
    "megatron_rpp/rollout/server.py",
}
STAND_INS = {"patches/megatron_core/cuda_stand_in.py"}  # streams and events of a device that is not there do nothing
SOURCE = ("megatron_rpp", "patches", "tools", "examples")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return [name for name in positional if name not in ("self", "cls", "ctx")]


def test_files_fit_on_a_few_screens() -> None:
    lengths = {name_of(path): path.read_text().count("\n") for path in python_files()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions_fit_on_one_screen() -> None:
    long = [(name_of(path), one.name, one.end_lineno - one.lineno + 1) for path in python_files() for one in functions(tree_of(path))]
    assert [entry for entry in long if entry[2] > FUNCTION_LINES] == []


def test_functions_take_few_positional_parameters() -> None:
    many = [(name_of(path), one.name, len(parameters(one))) for path in python_files(*SOURCE) for one in functions(tree_of(path))]
    assert [entry for entry in many if entry[2] > POSITIONAL and entry[1] not in DICTATED.get(entry[0], ())] == []


def test_nothing_is_left_for_later() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|pass\s+# later|\bNotImplementedError\b")
    found = [
        f"{name_of(path)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert [where for where in found if not where.startswith("tests/guards/test_budgets.py")] == []


def test_no_function_is_a_stub() -> None:
    """A body of `...` or `pass` alone stands only in a Protocol; a method that rightly does nothing has a docstring that says so."""
    stubs = []
    for path in python_files(*SOURCE):
        protocols = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef) and "Protocol" in ast.unparse(node)[:200]]
        allowed = {id(one) for protocol in protocols for one in functions(protocol)}
        for one in functions(tree_of(path)):
            is_empty = all(isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and ast.unparse(line) == "...") for line in one.body)
            if is_empty and id(one) not in allowed and name_of(path) not in STAND_INS:
                stubs.append(f"{name_of(path)}:{one.lineno} {one.name}")
    assert stubs == []


def test_names_say_what_a_thing_is() -> None:
    vague = re.compile(r"Manager|Helper|Utils?$|Common$|Base(Class)?$")
    files = [name_of(path) for path in python_files(*SOURCE) if path.stem in ("utils", "util", "helpers", "helper", "common", "misc")]
    classes = [
        (name_of(path), node.name) for path in python_files(*SOURCE) for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)
    ]
    assert files == []
    assert [entry for entry in classes if vague.search(entry[1])] == []


def test_any_exception_is_caught_only_where_it_is_data() -> None:
    """Elsewhere a handler for everything must let it go on: it ends in a bare `raise`, or hands the error over."""
    loose = []
    for path in python_files(*SOURCE):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and is_catch_all(node) and name_of(path) not in CATCH_ALL and not passes_on(node):
                loose.append(f"{name_of(path)}:{node.lineno}")
    assert loose == []


def is_catch_all(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def passes_on(handler: ast.ExceptHandler) -> bool:
    if handler.name is None:
        return any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    return any(isinstance(node, ast.Name) and node.id == handler.name for line in handler.body for node in ast.walk(line))


@pytest.mark.parametrize(
    ("code", "is_loose"),
    [
        ("try: f()\nexcept Exception: pass", True),
        ("try: f()\nexcept: log()", True),
        ("try: f()\nexcept (ValueError, BaseException) as e: log('x')", True),
        ("try: f()\nexcept BaseException:\n    close()\n    raise", False),
        ("try: f()\nexcept Exception as e:\n    future.set_exception(e)", False),
        ("try: f()\nexcept ValueError: pass", False),
    ],
)
def test_the_guard_tells_a_swallowed_exception_from_one_handed_on(code: str, is_loose: bool) -> None:
    handler = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ExceptHandler))
    assert (is_catch_all(handler) and not passes_on(handler)) is is_loose


def test_text_is_ascii_and_lines_are_short() -> None:
    wide = []
    for path in text_files():
        text = path.read_bytes()
        if not text.isascii():
            wide.append(f"{name_of(path)}: not ASCII")
        limit = 10**6 if path.suffix in (".md", ".txt", ".py") else 140  # documents wrap by themselves, the linter measures Python
        wide += [f"{name_of(path)}:{number}: {len(line)}" for number, line in enumerate(text.splitlines(), 1) if len(line) > limit]
    assert wide == []


def test_text_names_no_place_of_its_authors() -> None:
    """No path of a developer's machine, no private domain, no host but public ones."""
    private = re.compile(r"(?<![\w.])/(work|root|home|Users|mnt|workspace)/\w|\w\.(internal|corp|lan)\b")
    hosts = re.compile(r"https?://([\w.-]+)")
    public = (
        "github.com",
        "raw.githubusercontent.com",
        "arxiv.org",
        "huggingface.co",
        "pytorch.org",
        "www.apache.org",
        "docs.sglang.ai",
        "127.0.0.1",
    )
    found = []
    for path in text_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            unknown = [host for host in hosts.findall(line) if not host.endswith(public)]
            if private.search(line) or unknown:
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_nothing_of_the_size_of_data_lies_in_the_tree() -> None:
    files = [path for folder in ("megatron_rpp", "patches", "tests", "tools", "examples", "docs") for path in (ROOT / folder).rglob("*")]
    assert [name_of(path) for path in files if path.is_file() and path.stat().st_size > 500_000] == []
