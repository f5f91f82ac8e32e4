"""The layers of ARCHITECTURE.md, and which part may import which library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.guards.source import PACKAGE, ROOT, imports, name_of, python_files, tree_of

# A module imports strictly lower layers only; modules of one layer do not import each other.
LAYERS = (
    ("display", "errors", "files", "host", "input_file", "leftovers", "search_path", "signals", "types", "version"),
    ("config", "hf"),
    ("algo", "data", "dist", "reward", "stats", "torch_dist"),
    ("mcore", "rollout", "weights"),
    ("delivery", "engine_dir"),
    ("doctor", "launch", "observe", "placement", "resume"),
    ("collect", "process"),
    ("credit", "draw", "engines", "heldout", "inputs"),
    ("evaluate", "session", "supervised"),
    ("train",),
    ("__main__",),
)
# Exact statistics are sums over a process group. Settings are checked against the model that they name. Rewards score rows of files.
# Errors are escaped for display. A file that cannot be read is an error.
SIBLINGS = {("stats", "dist"), ("config", "hf"), ("reward", "data"), ("errors", "display"), ("input_file", "errors")}
SIBLINGS |= {("files", "errors")}

STORE = "megatron_rpp/rollout/queue"  # a store that leaders share; no process group
APPLY_PATCHES = ("megatron_rpp/mcore/init", "megatron_rpp/rollout/worker", "megatron_rpp/process", "megatron_rpp/data/template")
TORCH_DISTRIBUTED = tuple(f"megatron_rpp/{part}/" for part in ("dist", "mcore", "weights", "torch_dist"))
# library -> the files that may import it, as prefixes of their paths. Everything else speaks to it through them.
FENCE = {
    "megatron": ("megatron_rpp/mcore/", "patches/megatron_core/", "tests/", "tools/"),
    "sglang": ("megatron_rpp/rollout/", "patches/sglang/", "tests/", "tools/"),
    "transformers": ("megatron_rpp/data/", "megatron_rpp/mcore/build", "patches/", "tests/", "tools/", "examples/"),
    "tokenizers": ("megatron_rpp/data/tokenizer_file", "tests/", "examples/"),
    "pydantic": ("megatron_rpp/config/load",),
    "yaml": ("megatron_rpp/config/load", "tests/", "tools/"),
    "torch.distributed": (*TORCH_DISTRIBUTED, STORE, "patches/", "tests/", "tools/"),
    "megatron_rpp_patches": (*APPLY_PATCHES, "patches/", "tests/", "tools/"),
    "rich": ("megatron_rpp/observe/", "tests/", "tools/", "examples/"),
    "tensorboard": ("megatron_rpp/observe/", "tests/"),
    "torch.utils.tensorboard": ("megatron_rpp/observe/", "tests/"),
    "zmq": ("megatron_rpp/rollout/", "tests/"),
    "math_verify": ("megatron_rpp/reward/", "tests/", "tools/"),
    "ray": (),
    "wandb": (),
}
# Parts that answer at once, or run where torch must not be: they never import it while they themselves are imported.
WITHOUT_TORCH = ("config/", "hf/", "reward/", "observe/", "dist/world.py", "dist/hostlist.py", "data/tokenizer_file.py")
WITHOUT_TORCH += ("dist/activity.py", "dist/leaving.py", "dist/watch.py")
WITHOUT_TORCH += ("__main__.py", "display.py", "doctor.py", "errors.py", "files.py", "host.py", "input_file.py", "launch.py")
WITHOUT_TORCH += ("leftovers.py", "search_path.py", "signals.py", "version.py")


def layer_of(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def wrong_imports(part: str, tree: ast.AST) -> Iterator[str]:
    """Imports of this project that go up or sideways."""
    for line, name in imports(tree):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        is_part = any(other in parts for parts in LAYERS)
        if top == "megatron_rpp" and is_part and other != part and (part, other) not in SIBLINGS and layer_of(other) >= layer_of(part):
            yield f"line {line}: {part} (layer {layer_of(part)}) imports {other} (layer {layer_of(other)})"


def outside_fence(file: str, tree: ast.AST) -> Iterator[str]:
    for line, name in imports(tree):
        for library, allowed in FENCE.items():
            if (name == library or name.startswith(f"{library}.")) and not file.startswith(allowed):
                yield f"{file}:{line} imports {name}"


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in python_files("megatron_rpp")} - {"__init__"}
    assert parts == {part for layer in LAYERS for part in layer}


def test_imports_go_down() -> None:
    files = [path for path in python_files("megatron_rpp") if path != PACKAGE / "__init__.py"]
    assert [f"{name_of(path)}: {wrong}" for path in files for wrong in wrong_imports(part_of(path), tree_of(path))] == []


def test_modules_of_one_part_do_not_import_in_a_circle() -> None:
    graph = {}
    for path in python_files("megatron_rpp", "patches"):
        name = name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__").replace("patches", "megatron_rpp_patches", 1)
        found = [imported for _, imported in imports(tree_of(path), top_level_only=True)]
        graph[name] = {*found, *(imported.rpartition(".")[0] for imported in found)}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module] & graph.keys() - {module}):
                visit(target, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_libraries_stay_behind_their_fence() -> None:
    assert [wrong for path in python_files() for wrong in outside_fence(name_of(path), tree_of(path))] == []


def test_what_must_answer_at_once_does_not_import_torch() -> None:
    files = [path for path in python_files("megatron_rpp") if path.relative_to(PACKAGE).as_posix().startswith(WITHOUT_TORCH)]
    heavy = ("torch", "numpy", "transformers", "sglang", "megatron")
    found = [(name_of(path), line, name) for path in files for line, name in imports(tree_of(path), top_level_only=True)]
    assert [wrong for wrong in found if wrong[2].split(".")[0] in heavy] == []


def test_only_the_right_files_import_the_package_from_outside_it() -> None:
    """patches/ knows nothing of the package but its errors."""
    names = [(path, name) for path in python_files("patches") for _, name in imports(tree_of(path)) if name.startswith("megatron_rpp.")]
    assert [f"{name_of(path)}: {name}" for path, name in names if not name.startswith("megatron_rpp.errors")] == []


def test_planted_violations_are_found() -> None:
    """The guard itself: each wrong line of a made-up file is reported, each right one is not."""
    lines = ("from megatron_rpp.session import x", "from megatron_rpp import train", "import megatron_rpp.stats.moments")
    code = "\n".join((*lines, "from megatron_rpp.dist import world", "from megatron_rpp.errors import RppError"))
    assert list(wrong_imports("algo", ast.parse(code))) == [
        f"line 1: algo (layer 2) imports session (layer {layer_of('session')})",
        f"line 2: algo (layer 2) imports train (layer {layer_of('train')})",
        "line 3: algo (layer 2) imports stats (layer 2)",
        "line 4: algo (layer 2) imports dist (layer 2)",
    ]
    assert list(wrong_imports("stats", ast.parse("from megatron_rpp.dist import collectives"))) == []
    lines = ("def f():", "    import megatron.core", "from torch import distributed", "import megatronish", "import yaml")
    wrong = outside_fence("megatron_rpp/algo/a.py", ast.parse("\n".join((*lines, "from pydantic import x"))))
    assert sorted(line.partition(" ")[0] for line in wrong) == [f"megatron_rpp/algo/a.py:{number}" for number in (2, 3, 5, 6)]


def test_the_project_root_is_where_the_guards_think() -> None:
    assert (ROOT / "setup.py").exists()
    assert len(python_files("megatron_rpp")) > 40
