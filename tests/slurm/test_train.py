"""The shipped job script trains: two nodes, two tasks each, real Megatron-Core at TP2 x PP2 and a real engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import runs
from tests.slurm.cluster import Cluster

LAYOUT = ("parallel.tp=2", "parallel.pp=2", "run.steps=2", "checkpoint.every=0", "eval.every=0")


@pytest.mark.slow
def test_a_job_of_two_nodes_and_four_tasks_trains_and_saves(cluster: Cluster, tmp_path: Path) -> None:
    script = runs.ROOT / "examples" / "quickstart" / "make_assets.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, env=runs.environment(), timeout=200)
    (tmp_path / "run.yaml").write_text(runs.YAML.format(assets=tmp_path))
    exports = f"--export=ALL,RPP_PYTHON={sys.executable},PYTHONPATH={runs.ROOT},OMP_NUM_THREADS=1"
    # An hour, because the script has Slurm warn 600 s before the limit: with less the warning comes while the ranks start.
    options = (exports, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=60")
    sbatch = str(runs.ROOT / "examples" / "slurm" / "train.sbatch")
    job = cluster.call("sbatch", "--parsable", *options, sbatch, "run.yaml", "run.dir=run", *LAYOUT, cwd=tmp_path).strip()
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=runs.LIMIT_S)
    output = (tmp_path / f"rpp-{job}.out").read_text()
    assert state == "COMPLETED", output
    run = runs.Finished(tmp_path / "run", 0, output)
    assert [record["step"] for record in run.records("step")] == [1, 2]
    assert max(run.column("mismatch/max_abs")) <= 1e-4
    assert (run.dir / "checkpoints" / "step-000002" / "state.json").exists()
