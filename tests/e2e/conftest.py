"""One tiny model, and one uninterrupted run that the others are compared with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import runs


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model with random weights, and its problems."""
    folder = tmp_path_factory.mktemp("assets")
    script = runs.ROOT / "examples" / "quickstart" / "make_assets.py"
    subprocess.run([sys.executable, script, folder], check=True, env=runs.environment(), timeout=200)
    return folder


@pytest.fixture(scope="session")
def yaml(assets: Path) -> Path:
    path = assets / "run.yaml"
    path.write_text(runs.YAML.format(assets=assets))
    return path


@pytest.fixture(scope="session")
def uninterrupted(yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Finished:
    """Six steps at TP2, checkpoints after steps 3 and 6."""
    run = runs.train(yaml, tmp_path_factory.mktemp("runs") / "uninterrupted")
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="session")
def stateful(yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Finished:
    """Twenty steps at TP2 with all state that a run can have, started by torchrun; checkpoints after every sixth."""
    run_dir = tmp_path_factory.mktemp("runs") / "stateful"
    torchrun = ("--nproc-per-node=2", "--standalone", "-m", "megatron_rpp")
    words = ("train", str(yaml), f"run.dir={run_dir}", "run.steps=20", "checkpoint.every=6", *runs.STATEFUL)
    run = runs.Finished(run_dir, *runs.rpp(*torchrun, *words, module="torch.distributed.run"))
    assert run.code == 0, run.output
    return run
