"""Hosts that are refused, and hosts on which nothing is to be done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_rpp_patches
from megatron_rpp.errors import PatchError
from megatron_rpp_patches import _core
from megatron_rpp_patches.megatron_core import _host

NO_PSUTIL = "import sys; sys.modules['psutil'] = None; "
BROKEN = "raise RuntimeError('found empty shared library')\n"


def run(code: str, path: Path | None = None) -> str:
    """The last line of what a fresh interpreter wrote."""
    before = f"import sys; sys.path.insert(0, {str(path)!r}); " if path else ""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", before + code], capture_output=True, text=True, timeout=120)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_a_checkpoint_writer_dies_without_psutil() -> None:
    code = "from megatron.core.dist_checkpointing.strategies import filesystem_async as f; f._process_memory()"
    assert "psutil" in run(NO_PSUTIL + code)


def test_a_host_without_psutil_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rpp_patches.megatron_core import p070_host

    monkeypatch.setattr(p070_host.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PatchError, match=r"psutil is missing[\s\S]*pip install psutil"):
        p070_host._need_psutil()


def test_megatron_cannot_be_imported_beside_a_broken_transformer_engine(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(BROKEN)
    assert run("import megatron.core; print('imported')", tmp_path).startswith("RuntimeError")
    last = run("import megatron_rpp_patches; megatron_rpp_patches.apply('megatron_core')", tmp_path)
    assert last == "  fix: pip uninstall transformer-engine", last


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA and Transformer Engine, as far as the patches ask."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_host.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("gpu_host")
def test_with_cuda_and_transformer_engine_everything_but_the_psutil_check_is_inactive() -> None:
    reasons = {patch.id: patch.inactive() for patch in _core.patches_of("megatron_core")}
    assert [name for name, reason in reasons.items() if reason is None] == ["p070-psutil"]
    assert set(reasons.values()) == {None, "a CUDA device is present", "Transformer Engine is installed"}


@pytest.mark.usefixtures("gpu_host")
def test_an_inactive_set_touches_nothing_and_its_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(_core, "_ENTRIES", {})
    finders, method, collective = list(sys.meta_path), torch.Tensor.type, torch.distributed.all_reduce
    megatron_rpp_patches.apply("megatron_core", children=False)
    rows = {row["id"]: row for row in megatron_rpp_patches.report()}
    assert (sys.meta_path, torch.Tensor.type, torch.distributed.all_reduce) == (finders, method, collective)
    assert [name for name, row in rows.items() if row["active"]] == ["p070-psutil"]
    assert rows["p001-torch-overlay"]["reason"] == "a CUDA device is present"
    assert rows["p050-optimizer-start"]["reason"] == "Transformer Engine is installed"
