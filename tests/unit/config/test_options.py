"""Settings that are passed through to Megatron-Core and SGLang: a mistake in one is found before either is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from megatron_rpp.config.load import load, load_with_lines
from megatron_rpp.config.options import MEGATRON, OWNED_MEGATRON, OWNED_SGLANG, SGLANG, Source, declared_fields
from megatron_rpp.config.validate import validate
from megatron_rpp.errors import ConfigError, GeometryError
from tests.unit.config.conftest import Write


def refusals(project: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load(project, overrides))
    assert type(caught.value) is not GeometryError
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


REFUSED = [
    ("model.megatron.recompute_granularty=full", "unknown setting; did you mean model.megatron.recompute_granularity?"),
    ("model.megatron.tp_comm_overlapp=true", "unknown setting; did you mean model.megatron.tp_comm_overlap?"),  # of the base class
    ("model.megatron.zzz=1", "unknown setting; see TransformerConfig in megatron.core.transformer.transformer_config"),
    ("model.megatron.recompute_num_layers=two", 'expected a whole number or null, got "two"'),
    ("model.megatron.recompute_num_layers=true", "expected a whole number or null, got true"),
    ("model.megatron.recompute_num_layers=1.0", "expected a whole number or null, got 1.0"),
    ("model.megatron.hidden_dropout=false", "expected a number, got false"),
    ("model.megatron.overlap_p2p_comm=1", "expected true or false, got 1"),
    ("model.megatron.hidden_dropout=null", "expected a number, got null"),
    ("model.megatron.tensor_model_parallel_size=2", "cannot be set here: set parallel.tp"),
    ("model.megatron.num_layers=two", "cannot be set here: it is what config.json in model.hf says"),
    ("rollout.sglang.mem-fraction-static=0.5", "unknown setting; did you mean rollout.sglang.mem_fraction_static?"),
    ("rollout.sglang.zzz=1", "unknown setting; see ServerArgs in sglang.srt.server_args"),
    ("rollout.sglang.gpu_id=0", "unknown setting; did you mean rollout.sglang.gpu_id_step?"),  # SGLang derives it and takes no value
    ("rollout.sglang.tp_size=2", "cannot be set here: set rollout.tp"),
    ("rollout.sglang.disable_radix_cache='no'", 'expected true or false, got "no"'),
    ("rollout.sglang.kv_cache_dtype=8", "expected a word, got 8"),
    ("rollout.sglang.mem_fraction_static=half", 'expected a number or null, got "half"'),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_a_mistake_in_a_passed_through_setting_is_refused(project: Path, override: str, message: str) -> None:
    assert refusals(project, override) == [f"{override.partition('=')[0]}: {message}"]


@pytest.mark.parametrize(
    "override",
    [
        "model.megatron.recompute_num_layers=2",
        "model.megatron.recompute_num_layers=null",
        "model.megatron.hidden_dropout=0",  # a whole number is a number
        "model.megatron.overlap_p2p_comm=false",
        "model.megatron.recompute_modules=core_attn,mlp",  # a list: mcore/build.py reads it
        "model.megatron.attention_backend=unfused",  # an enumeration
        "model.megatron.recompute_granularity=full",
        "rollout.sglang.mem_fraction_static=1",
        "rollout.sglang.attention_backend=null",
        "rollout.sglang.disable_radix_cache=true",
        "rollout.sglang.dtype=float32",
        "rollout.sglang.load_balance_method=round_robin",
    ],
)
def test_a_right_value_of_a_passed_through_setting_is_let_through(project: Path, override: str) -> None:
    validate(load(project, [override]))


def test_mistakes_in_both_blocks_are_reported_with_all_others_and_their_lines(write: Write, project: Path) -> None:
    text = "extends: run.yaml\nmodel:\n  megatron:\n    hidden_droput: 0.1\n"
    path = write("bad.yaml", f"{text}rollout:\n  sglang:\n    tp_sise: 2\n    page_size: big\n  top_p: 2\n")
    cfg, lines = load_with_lines(path)
    with pytest.raises(ConfigError) as caught:
        validate(cfg, lines=lines, source="bad.yaml")
    assert str(caught.value).splitlines() == [
        "bad.yaml: 4 settings are wrong",
        f"  {path}:9  rollout.top_p: must be in (0, 1], got 2.0; 1.0 samples from the whole distribution",
        f"  {path}:4  model.megatron.hidden_droput: unknown setting; did you mean model.megatron.hidden_dropout?",
        f"  {path}:7  rollout.sglang.tp_sise: unknown setting; did you mean rollout.sglang.tp_size?",
        f'  {path}:8  rollout.sglang.page_size: expected a whole number or null, got "big"',
    ]


def test_the_settings_read_from_the_pinned_libraries_are_all_that_their_classes_have() -> None:
    """Counted once on the imported classes, which takes too long here; another version needs another count.

    SGLang also keeps a literal list of those that may be given by position, which is most of them.
    """
    megatron, sglang = declared_fields(MEGATRON), declared_fields(SGLANG)
    assert len(megatron) == {"0.16.1": 242}[metadata.version("megatron-core")]
    assert len(sglang) == {"0.5.21": 519}[metadata.version("sglang").partition("+")[0]]
    assert OWNED_MEGATRON.keys() <= megatron.keys()
    assert OWNED_SGLANG.keys() <= sglang.keys()
    order = Path(util.find_spec("sglang").submodule_search_locations[0], "srt", "arg_groups", "field_order.py")
    positional = next(ast.literal_eval(node.value) for node in ast.parse(order.read_text()).body if isinstance(node, ast.Assign))
    assert len(positional) > 300
    assert [name for name in positional if name not in sglang] == []


def test_reading_the_settings_imports_none_of_the_libraries(project: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from megatron_rpp.config.load import load
from megatron_rpp.config.validate import validate
validate(load(Path({str(project)!r}), ["model.megatron.hidden_dropout=0", "rollout.sglang.page_size=1"]))
print(*(name.partition(".")[0] for name in sys.modules))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "megatron", "sglang", "numpy"} & set(result.stdout.split())


# A made-up library. The class inherits over two modules, one of them by a relative import under another name.
LIBRARY = {
    "lib/__init__.py": "raise SystemExit('imported')",
    "lib/core/settings.py": "from ..base import Base as Old\nfrom typing import ClassVar\nclass Settings(Old):\n"
    "    a: int = 0\n    LIMIT: ClassVar[int] = 3\n    note = 'no field'\n    def method(self): x: int = 1\n",
    "lib/base.py": "import other\nfrom lib.root import Root\nclass Base(Root, other.Struct):\n    b: str\n",
    "lib/root/__init__.py": "from .inner import Root\n",
    "lib/root/inner.py": "class Root:\n    c: 'bool'\n",
    "lib/parts.py": "from lib.base import Base as One\nfrom lib.root import Root\nclass Whole:\n    d: int\nPARTS = [One, Root]\n",
}


@pytest.fixture
def library(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in LIBRARY.items():
        write(name, text)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("library")
def test_fields_of_base_classes_and_of_listed_parts_are_found_without_running_the_library() -> None:
    assert set(declared_fields(Source("lib", "core.settings", "Settings"))) == {"a", "b", "c"}
    assert set(declared_fields(Source("lib", "parts", "Whole", "PARTS"))) == {"b", "c", "d"}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lib/base.py", "from elsewhere import Base\n"),  # outside the library
        ("lib/base.py", "Base = make()\n"),
        ("lib/base.py", "class Base(:\n"),
        ("lib/core/settings.py", "settings = 1\n"),
    ],
)
def test_a_source_that_is_not_understood_knows_no_fields_rather_than_some(write: Write, name: str, text: str) -> None:
    write(name, text)
    assert declared_fields(Source("lib", "core.settings", "Settings")) == {}


def test_without_the_library_only_what_is_ours_is_checked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    validate(load(project, ["model.megatron.zzz=1", "rollout.sglang.page_size=big"]))
    assert refusals(project, "model.megatron.bf16=true") == ["model.megatron.bf16: cannot be set here: set model.dtype"]
