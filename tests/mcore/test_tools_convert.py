"""The checkpoint tools as a user runs them, and what they write in the hands of the real Megatron-Core."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from megatron_rpp.config.schema import Config
from megatron_rpp.dist.groups import Groups
from megatron_rpp.dist.world import World
from megatron_rpp.errors import CheckpointError
from megatron_rpp.hf.model import read_model
from megatron_rpp.mcore.weights_header import weights_header
from megatron_rpp.observe.log import RunLog
from megatron_rpp.observe.rundir import RunDir
from megatron_rpp.process import Process, open_policy
from megatron_rpp.weights.compare import compare
from megatron_rpp.weights.convert import to_hf, to_megatron
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.hf_io import open_hf
from megatron_rpp.weights.megatron_checkpoint import open_megatron
from tests.dist.ranks import free_port, run_ranks
from tests.mcore import sparse, tiny
from tests.mcore.layouts import num_ranks

ROOT = Path(__file__).parents[2]
LAYOUTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "tp1": ({}, (*tiny.KINDS, *sparse.MODELS)),
    "tp4, more ranks than key-value heads": (dict(tp=4), tiny.KINDS),
    "tp2 pp2": (dict(tp=2, pp=2), tiny.KINDS),
    "pp2 vpp2": (dict(pp=2, vpp=2), (*tiny.KINDS, *sparse.MODELS)),
    "ep2 over tp2": (dict(tp=2, ep=2), ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3")),
    "ep2 over dp2": (dict(dp=2, ep=2), ("mixtral", "deepseek_v3")),
}


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user runs it. Importing torch is most of its time: `inside` does for everything but the command line itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def inside(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same tool, its arguments and its exit status included, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.syspath_prepend(str(ROOT / "tools"))
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            status = importlib.import_module("checkpoint_cli").run(importlib.import_module(name).main)
        except SystemExit as error:  # argparse
            status = error.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def models(hf_root: Path, sparse_root: Path) -> dict[str, Path]:
    return {kind: root / kind for root, kinds in ((hf_root, tiny.KINDS), (sparse_root, sparse.MODELS)) for kind in kinds}


@pytest.fixture(scope="module")
def converted(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint of every kind of model, by the tool, under the name of the kind."""
    root = tmp_path_factory.mktemp("converted")
    for kind, hf in models.items():
        if kind == "llama":
            done = tool("convert_hf_to_megatron", hf, root / kind)
            assert done.returncode == 0, done.stderr
            assert done.stdout.endswith("tensors compared, all equal\n")
        else:  # the same without a process of its own
            with open_hf(hf) as source:
                to_megatron(source, describe(source.config), root / kind, header=weights_header(read_model(hf)))
    return root


def _load_save(rank: int, jobs: dict[str, tuple[dict[str, Path], int]], converted: Path, saved: Path) -> list[str]:
    """What differs after a load of the tool's checkpoint from a load of the HF directory; then saves as a run does. In every layout."""
    wrong = []
    for layout, (models, port) in jobs.items():
        os.environ["MASTER_PORT"] = str(port)  # the store of the layout before may live on for a while
        wrong += [f"{layout}, {name}" for name in _load_save_one(models, converted, LAYOUTS[layout][0], saved / layout)]
    return wrong


def _load_save_one(models: dict[str, Path], converted: Path, sizes: dict[str, int], saved: Path) -> list[str]:
    wrong = []
    with tiny.megatron(tiny.make_config(next(iter(models.values())), **sizes)) as groups:
        for kind, hf in models.items():
            cfg = tiny.make_config(hf, optim=dict(distributed=False), **sizes)
            policy = tiny.open_policy(cfg, groups)
            wanted = [(name, tensor.detach().clone()) for name, _, tensor in policy.named_local()]
            with torch.no_grad():
                for _, _, tensor in policy.named_local():
                    tensor.fill_(float("nan"))
            policy.load_weights(converted / kind)
            got = [tensor for _, _, tensor in policy.named_local()]
            wrong += [f"{kind}: {name}" for (name, want), tensor in zip(wanted, got, strict=True) if not torch.equal(tensor, want)]
            saved.mkdir(parents=True, exist_ok=True)
            policy.save(saved / kind)
    return wrong


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the runs of a layout saved what they had loaded. One spawn for all layouts of as many ranks."""
    root = tmp_path_factory.mktemp("saved")

    @cache
    def spawn(world: int) -> None:
        jobs = {layout: ({kind: models[kind] for kind in kinds}, free_port()) for layout, (sizes, kinds) in LAYOUTS.items()
                if num_ranks(sizes) == world}  # fmt: skip
        assert run_ranks(world, _load_save, jobs, converted, root, init=False, timeout_s=400.0) == [[]] * world

    def of(layout: str) -> Path:
        spawn(num_ranks(LAYOUTS[layout][0]))
        return root / layout

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_a_converted_model_in_any_layout_and_its_checkpoint_goes_back_to_the_same_bits(
    layout: str, models: dict[str, Path], converted: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, (_, kinds) = saved(layout), LAYOUTS[layout]
    for kind in kinds:
        with open_hf(models[kind]) as hf, open_megatron(folder / kind, describe(hf.config)) as checkpoint:
            to_hf(checkpoint, tmp_path / f"{kind} hf", carried=models[kind])
            with open_hf(tmp_path / f"{kind} hf") as back:
                assert back.entries.keys() == hf.entries.keys() and compare(hf, back) is None, kind
    if layout == "tp1":
        for kind in kinds:
            assert asked_for(folder / kind) <= asked_for(converted / kind), kind


def test_every_family_is_in_every_kind_of_layout_that_it_has() -> None:
    """Dense: tp below and above the key-value heads, pp, vpp. Experts: tp, pp, vpp, and ep over tp and over dp."""
    axes = {kind: set() for kind in (*tiny.KINDS, *sparse.MODELS)}
    for sizes, kinds in LAYOUTS.values():
        for kind in kinds:
            axes[kind] |= {f"tp{sizes['tp']}" if name == "tp" else name for name in sizes}
    assert all(axes[kind] >= {"tp2", "tp4", "pp", "vpp"} for kind in tiny.KINDS)
    families = {kind.partition(",")[0].partition(" ")[0] for kind in sparse.MODELS}
    for family in families:
        assert axes[family] >= {"tp2", "pp", "vpp", "ep"}, (family, axes[family])


def test_the_tools_take_a_runs_checkpoint_to_hf_and_find_all_equal(
    models: dict[str, Path], converted: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    run = saved("tp2 pp2") / "qwen3"
    done = tool("convert_megatron_to_hf", run, tmp_path / "hf", "--hf", models["qwen3"], "--shard-gb", "0.0002")
    assert done.returncode == 0 and done.stdout.endswith("47 tensors compared, all equal\n"), done.stderr
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    for call, left, right in ((tool, models["qwen3"], tmp_path / "hf"), (inside, run, converted / "qwen3")):
        done = call("verify_checkpoint", left, right)
        assert done.returncode == 0 and done.stdout.endswith("47 tensors compared, all equal\n"), done.stderr


def asked_for(checkpoint: Path) -> set[str]:
    """Keys of the model's tensors and objects: what any load of such a model asks for."""
    keys = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    return {key for key in keys if not key.startswith(("optimizer.", "rng/"))}


def _start_from(cfg: Config, checkpoint: Path | None, groups: Groups, hf: Path | None = None) -> dict[str, torch.Tensor]:
    """The weights that a run opens its policy with."""
    cfg = replace(cfg, model=replace(cfg.model, megatron_checkpoint=checkpoint))
    process = Process(cfg, World.from_env(), groups, RunDir(cfg.run.dir), RunLog(cfg.observe, None), 0)
    return {name: tensor.detach().clone() for name, _, tensor in open_policy(process, trainable=False, hf=hf)[0].named_local()}


def _starts(rank: int, hf: Path, same_hf: Path, checkpoint: Path, other: Path, scratch: Path) -> list[str]:
    """A run that starts from a checkpoint whose weights are twice those of model.hf. Returns what the mistakes say."""
    cfg, said = tiny.make_config(hf), []
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        with torch.no_grad():
            for _, _, tensor in policy.named_local():
                tensor.mul_(2)
        policy.weights_changed()
        policy.save(scratch / "doubled")
        plain = _start_from(cfg, None, groups)
        doubled = _start_from(cfg, scratch / "doubled", groups)
        assert all(torch.equal(doubled[name], 2 * tensor) and tensor.any() for name, tensor in plain.items())
        for checkpoint_of_a_tool, folder in ((checkpoint, None), (scratch / "doubled", same_hf)):  # the second is a reference of its own
            got = _start_from(cfg, checkpoint_of_a_tool, groups, folder)
            assert all(torch.equal(got[name], tensor) for name, tensor in plain.items())
        attempts = [partial(_start_from, cfg, wrong, groups) for wrong in (scratch / "absent", hf, other)]
        for attempt in (*attempts, partial(policy.load, checkpoint)):
            with pytest.raises(CheckpointError) as caught:
                attempt()
            said.append(str(caught.value))
    return said


def test_a_run_starts_from_a_megatron_checkpoint_and_refuses_what_is_none(models: dict[str, Path], converted: Path, tmp_path: Path) -> None:
    shutil.copytree(models["qwen2"], tmp_path / "qwen2")
    arguments = (models["qwen2"], tmp_path / "qwen2", converted / "qwen2", converted / "qwen3", tmp_path)
    (said,) = run_ranks(1, _starts, *arguments, init=False, timeout_s=120.0)
    assert "absent: there is no such checkpoint" in said[0]
    assert "files.json" in said[1] and "of another model than config.json" in said[2] and "qwen3" in said[2]
    assert "the checkpoint's format is another" in said[3] and "weights 1" in said[3], "a resume needs more than weights"


def test_verify_prints_the_first_difference(models: dict[str, Path], converted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["llama"], copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    done = inside("verify_checkpoint", converted / "llama", copy)
    assert done.returncode == 1
    assert "differs\n" in done.stdout and f"  {copy}: 0.0" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "status", "message"),
    [
        ("convert_hf_to_megatron", ["absent", "out"], 1, "absent/config.json: cannot read the file"),
        ("convert_hf_to_megatron", ["{llama}", "out", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        ("convert_hf_to_megatron", ["{llama}", "out", "--shard-gb", "0"], 2, "invalid positive value: '0'"),
        ("convert_hf_to_megatron", ["{llama}", "{llama}"], 1, "the source lies in it"),
        ("convert_megatron_to_hf", ["{llama}", "out"], 1, "not a Megatron checkpoint"),
        ("convert_megatron_to_hf", ["{qwen2 checkpoint}", "out", "--hf", "{llama}"], 1, "of another model than config.json"),
        ("verify_checkpoint", ["{llama}"], 2, "the following arguments are required: B"),
    ],
)
def test_a_mistake_is_one_clear_message(
    name: str, arguments: list[str], status: int, message: str, models: dict[str, Path], converted: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"llama": models["llama"], "qwen2 checkpoint": converted / "qwen2"}
    done = inside(name, *(argument.format(**places) for argument in arguments))
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direction", ["convert_hf_to_megatron", "convert_megatron_to_hf"])
def test_a_full_disk_names_file_and_tensor_and_the_next_run_goes_on(
    direction: str, models: dict[str, Path], converted: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the disk: the write fails in the same place."""
    source = models["llama"] if direction == "convert_hf_to_megatron" else converted / "llama"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        done = inside(direction, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write " in done.stderr and "File too large" in done.stderr and "it goes on where it stopped" in done.stderr
    assert "__0_0.distcp: cannot write decoder" in done.stderr or "model.safetensors: cannot write model.layers" in done.stderr
    assert not (tmp_path / "out").exists()
    done = inside(direction, source, tmp_path / "out")
    assert done.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_no_result_and_the_same_command_finishes_it(models: dict[str, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [models["llama"], tmp_path / "out", "--shard-gb", "0.00002"]
    command = [sys.executable, str(ROOT / "tools" / "convert_hf_to_megatron.py"), *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.unfinished/__0_1.distcp")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert not (tmp_path / "out").exists(), "it was killed too late to prove anything"
    done = inside("convert_hf_to_megatron", *arguments)
    assert done.returncode == 0 and "went on after " in done.stdout, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
