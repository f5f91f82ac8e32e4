"""A tied model whose files hold a head as well, in a run, in the tools, and against what transformers does with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rpp.config.schema import Algo, Config, Critic
from megatron_rpp.errors import CheckpointError
from megatron_rpp.process import open_critic, open_policy, open_process
from megatron_rpp.torch_dist.listing import write_common
from megatron_rpp.weights.tied_head import EMBEDDING, HEAD
from tests.dist.ranks import free_port, run_ranks
from tests.mcore import tiny
from tests.mcore.hf import transformers
from tests.mcore.test_tools_convert import inside

NAMES = f"{HEAD} differs from {EMBEDDING}, but config.json ties the two"


def one_element(head: Tensor) -> Tensor:
    head[7, 3] += 1.0
    return head


@pytest.fixture(scope="module")
def folders(hf_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tied qwen2 with no head, an equal one, one with another element; and the last one untied, as the error says to do it."""
    root = tmp_path_factory.mktemp("tied")
    changes: dict[str, Callable[[Tensor], Tensor]] = {"equal": lambda head: head, "other": one_element, "untied": one_element}
    made = {"plain": hf_root / "qwen2"}
    for name, change in changes.items():
        made[name] = root / name
        shutil.copytree(hf_root / "qwen2", made[name])
        tensors = load_file(made[name] / "model.safetensors")
        tensors[HEAD] = change(tensors[EMBEDDING].clone())
        save_file(tensors, made[name] / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made["untied"] / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    (made["untied"] / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return made


def config(hf: Path, run_dir: Path, **parallel: int) -> Config:
    cfg = tiny.make_config(hf, **parallel)
    return replace(cfg, run=replace(cfg.run, dir=run_dir), model=replace(cfg.model, hf=hf))


def _opens(rank: int, folders: dict[str, Path], run_dir: Path, parallel: dict[str, int], free: list[int]) -> dict[str, str]:
    """What each way of opening a run says. "plain" and "equal" must load the same weights."""
    plain, other, said = folders["plain"], folders["other"], {}
    ports = iter(free)  # the store of the group before may live on for a while
    with_ref = Algo(kl_loss_coef=0.1)
    attempts = {
        "policy, sft": ("sft", config(other, run_dir, **parallel)),
        "policy, train": ("train", config(other, run_dir, **parallel)),
        "engine, eval": ("eval", config(other, run_dir, **parallel)),
        "reference": ("train", replace(config(plain, run_dir, **parallel), algo=with_ref)),
    }
    attempts["reference"] = ("train", replace(attempts["reference"][1], model=replace(attempts["reference"][1].model, ref=other)))
    for name, (command, cfg) in attempts.items():
        os.environ["MASTER_PORT"] = str(next(ports))
        with pytest.raises(CheckpointError) as error, open_process(cfg, command):
            said[name] = "opened"
        said[name] = str(error.value)
    critics = []
    for hf in (plain, other):  # a critic reads no head
        os.environ["MASTER_PORT"] = str(next(ports))
        with_critic = replace(config(plain, run_dir, **parallel), algo=Algo(estimator="gae"), critic=Critic(hf=hf))
        with open_process(with_critic, "train") as process:
            critics.append({key: tensor.clone() for key, _, tensor in open_critic(process).named_local()})
    assert all(torch.equal(tensor, critics[1][key]) for key, tensor in critics[0].items()) and critics[0]
    loaded = {}
    for name in ("plain", "equal"):
        os.environ["MASTER_PORT"] = str(next(ports))
        with open_process(config(folders[name], run_dir, **parallel), "sft") as process:
            policy, _ = open_policy(process, trainable=False)
            loaded[name] = {key: tensor.clone() for key, _, tensor in policy.named_local()}
    assert all(torch.equal(tensor, loaded["equal"][key]) and tensor.any() for key, tensor in loaded["plain"].items())
    return said


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}], ids=["tp1", "tp2"])
def test_every_model_of_a_run_with_a_head_is_checked_before_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path, parallel: dict[str, int]
) -> None:
    found = run_ranks(
        parallel.get("tp", 1), _opens, folders, tmp_path / "run", parallel, [free_port() for _ in range(8)], init=False, timeout_s=200.0
    )
    for said in found:
        assert list(said) == ["policy, sft", "policy, train", "engine, eval", "reference"]
        for name, message in said.items():
            assert NAMES in message and str(folders["other"] / "model.safetensors") in message, name
            assert "at row 7, column 3" in message and '"tie_word_embeddings": false' in message, name


def _logp(rank: int, hf: Path) -> Tensor:
    cfg = tiny.make_config(hf)
    with tiny.megatron(cfg) as groups:
        batch, _ = tiny.make_batch(tiny.make_groups())
        return tiny.open_policy(cfg, groups, trainable=False).logprobs(batch)


def test_the_way_out_gives_the_model_that_transformers_gives(folders: dict[str, Path]) -> None:
    """transformers keeps the head of the directory that is refused; with the entry corrected we compute the same."""
    model = transformers().AutoModelForCausalLM.from_pretrained(folders["other"])
    batch, _ = tiny.make_batch(tiny.make_groups())
    wanted_T = torch.zeros(batch.num_tokens)
    starts = batch.cu_len_S1.tolist()
    with torch.no_grad():
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            tokens = batch.tokens_T[start:end]
            logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
            wanted_T[start + 1 : end] = logp.gather(1, tokens[1:, None])[:, 0]
    (got_T,) = run_ranks(1, _logp, folders["untied"], init=False, timeout_s=120.0)
    (tied_T,) = run_ranks(1, _logp, folders["plain"], init=False, timeout_s=120.0)
    mask_T = batch.mask_T
    torch.testing.assert_close(got_T[mask_T], wanted_T[mask_T], atol=2e-5, rtol=0)
    assert (tied_T[mask_T] - wanted_T[mask_T]).abs().max() > 0.01, "the two heads must be told apart"


def test_conversion_both_ways_says_what_becomes_of_the_head(folders: dict[str, Path], tmp_path: Path) -> None:
    refused = inside("convert_hf_to_megatron", folders["other"], tmp_path / "refused")
    assert refused.returncode == 1 and NAMES in refused.stderr and not (tmp_path / "refused").exists()
    for name, note in {
        "plain": f"head: tied to {EMBEDDING}; there is no {HEAD}",
        "equal": f"head: tied; {HEAD} equals {EMBEDDING} and is left out",
        "untied": f"head: {HEAD} is a tensor of its own",
    }.items():
        done = inside("convert_hf_to_megatron", folders[name], tmp_path / name)
        assert done.returncode == 0 and f"\n{note}\n" in done.stdout, done.stdout + done.stderr
    back = inside("convert_megatron_to_hf", tmp_path / "equal", tmp_path / "back")
    assert f"\nhead: tied to {EMBEDDING}; there is no {HEAD}\n" in back.stdout, back.stdout + back.stderr
    assert HEAD not in load_file(tmp_path / "back" / "model.safetensors")
    back = inside("convert_megatron_to_hf", tmp_path / "untied", tmp_path / "back-untied")
    assert f"\nhead: {HEAD} is a tensor of its own\n" in back.stdout, back.stdout + back.stderr
    assert torch.equal(
        load_file(tmp_path / "back-untied" / "model.safetensors")[HEAD], load_file(folders["other"] / "model.safetensors")[HEAD]
    )


def test_a_comparison_says_what_becomes_of_the_head(folders: dict[str, Path], tmp_path: Path) -> None:
    assert inside("convert_hf_to_megatron", folders["plain"], tmp_path / "plain").returncode == 0
    same = inside("verify_checkpoint", folders["equal"], tmp_path / "plain")
    assert same.returncode == 0 and f"{folders['equal']}: head: tied; {HEAD} equals {EMBEDDING} and is left out\n" in same.stdout
    other = inside("verify_checkpoint", folders["other"], tmp_path / "plain")
    assert other.returncode == 1 and NAMES in other.stderr and "all equal" not in other.stdout


def test_two_directories_of_which_one_has_an_equal_head_are_equal(folders: dict[str, Path]) -> None:
    for pair in (("plain", "equal"), ("equal", "plain")):
        same = inside("verify_checkpoint", *(folders[name] for name in pair))
        assert same.returncode == 0 and "all equal" in same.stdout, same.stdout + same.stderr
        assert f"\n{folders['equal']}: head: tied; {HEAD} equals {EMBEDDING} and is left out\n" in f"\n{same.stdout}"
        assert f"\n{folders['plain']}: head: tied to {EMBEDDING}; there is no {HEAD}\n" in f"\n{same.stdout}"
        other = inside("verify_checkpoint", *(folders["other" if name == "equal" else name] for name in pair))
        assert other.returncode == 1 and NAMES in other.stderr and "all equal" not in other.stdout
    untied = inside("verify_checkpoint", folders["untied"], folders["plain"])
    assert untied.returncode == 1 and f"{HEAD}: the tensor differs" in untied.stdout, untied.stdout + untied.stderr
    heads = inside("verify_checkpoint", folders["equal"], folders["other"])
    assert heads.returncode == 1 and f"{HEAD}: element [7, 3] differs" in heads.stdout, heads.stdout + heads.stderr


def test_a_head_that_config_json_contradicts_is_refused_on_the_way_back(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("plain", "untied"):
        assert inside("convert_hf_to_megatron", folders[name], tmp_path / name).returncode == 0
    for name, other, entry in (("untied", "plain", "false"), ("plain", "untied", "true")):
        shutil.copy(folders[other] / "config.json", tmp_path / name / "hf" / "config.json")
        # as a checkpoint of another program, which does not say what model it holds and lists no files
        write_common(tmp_path / name, {})
        (tmp_path / name / "files.json").unlink()
        done = inside("convert_megatron_to_hf", tmp_path / name, tmp_path / "back")
        assert done.returncode == 1 and f'"tie_word_embeddings": {entry}' in done.stderr, done.stdout + done.stderr
        assert "output_layer.weight" in done.stderr
