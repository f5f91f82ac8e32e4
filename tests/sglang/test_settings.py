"""What an engine is told, and what is kept from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout.server import check_reports
from megatron_rpp.rollout.settings import EngineSettings, environment, model_overrides, num_threads, server_args, thread_binding


def test_nothing_of_the_trainers_group_reaches_the_engine() -> None:
    trainer = {
        "PATH": "/bin",
        "HF_HOME": "/hf",
        "NCCL_SOCKET_IFNAME": "eth0",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "1234",
        "TORCHELASTIC_RUN_ID": "x",
        "SLURM_PROCID": "3",
        "PMI_RANK": "3",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
    }
    env = environment(EngineSettings(hf="/m", device="cuda", tp=2, gpu_ids=(2, 3)), trainer)
    assert {key: env.pop(key) for key in ("PATH", "HF_HOME", "NCCL_SOCKET_IFNAME")} == {
        "PATH": "/bin",
        "HF_HOME": "/hf",
        "NCCL_SOCKET_IFNAME": "eth0",
    }
    assert env.pop("CUDA_VISIBLE_DEVICES") == "6,7", "the third and fourth of those that the trainer sees"
    assert env.pop("GLOO_SOCKET_IFNAME") == "lo"
    assert set(env) == {"SGLANG_PLUGINS", "PYTHONWARNINGS"}


def test_nothing_is_compiled_at_the_first_token_on_a_cpu() -> None:
    assert environment(EngineSettings(hf="/m"), {})["TORCH_COMPILE_DISABLE"] == "1"


def _overrides(folder: Path, config: dict, **sglang: str) -> dict:
    (folder / "config.json").write_text(json.dumps(config))
    return json.loads(model_overrides(EngineSettings(hf=str(folder), sglang=sglang)))


def test_what_a_deepseek_config_leaves_out_is_told_to_sglang(tmp_path: Path) -> None:
    absent = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    assert _overrides(tmp_path, {"model_type": "deepseek_v3", "n_group": 8, "topk_group": 4}) == absent
    assert _overrides(tmp_path, {"model_type": "deepseek_v3", **absent, "norm_topk_prob": False}) == {}
    assert _overrides(tmp_path, {"model_type": "qwen2_moe"}) == {}


def test_greedy_choice_of_experts_has_no_groups_in_sglang_either(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2}
    assert _overrides(tmp_path, config).items() >= {"topk_method": "greedy", "n_group": 1, "topk_group": 1}.items()
    assert "n_group" not in _overrides(tmp_path, {**config, "topk_method": "group_limited_greedy"})


def test_overrides_of_the_user_go_before_ours(tmp_path: Path) -> None:
    found = _overrides(tmp_path, {"model_type": "deepseek_v3"}, json_model_override_args='{"moe_layer_freq": 2, "other": 3}')
    assert (found["moe_layer_freq"], found["other"], found["scoring_func"]) == (2, 3, "sigmoid")


def test_a_shared_expert_is_never_fused_into_the_routed_ones() -> None:
    assert server_args(EngineSettings(hf="/m", device="cuda"))["disable_shared_experts_fusion"]


def test_settings_of_the_user_overrule_ours() -> None:
    settings = EngineSettings(hf="/m", sglang={"attention_backend": "flex_attention", "max_total_tokens": 77, "log_level": "debug"})
    args = server_args(settings)
    assert (args["attention_backend"], args["max_total_tokens"], args["log_level"]) == ("flex_attention", 77, "debug")
    assert args["sampling_backend"] == "pytorch"


def test_the_key_value_pool_holds_every_request_at_its_longest() -> None:
    args = server_args(EngineSettings(hf="/m", max_concurrent=10, max_sequence_tokens=300))
    assert args["max_total_tokens"] >= 3000
    assert args["max_running_requests"] == 10


@pytest.mark.parametrize(
    ("cores", "slots", "tp", "expected"),
    [
        ([0, 1], 1, 1, ["0"]),
        ([0, 1], 1, 2, ["0|1"]),
        ([0, 1], 2, 1, ["0", "1"]),
        ([4, 5, 6, 7, 8, 9, 10, 11], 2, 2, ["4|6", "8|10"]),
        ([3], 2, 2, ["3|3", "3|3"]),
    ],
)
def test_engines_of_a_host_divide_its_cores(cores: list[int], slots: int, tp: int, expected: list[str]) -> None:
    assert [thread_binding(EngineSettings(hf="/m", tp=tp, slot=slot, slots_on_host=slots), cores) for slot in range(slots)] == expected


def test_one_thread_while_results_must_not_depend_on_the_batch() -> None:
    assert num_threads(EngineSettings(hf="/m"), 64) == 1
    free = {"enable_deterministic_inference": False}
    assert num_threads(EngineSettings(hf="/m", slots_on_host=2, tp=2, sglang=free), 64) == 8
    assert num_threads(EngineSettings(hf="/m", slots_on_host=2, tp=2, sglang=free), 2) == 1


def _report(role: str, rank: str, *active: str) -> dict:
    rows = [{"id": name, "active": name in active} for name in ("p1", "p2", "p3")]
    return {"role": role, "rank": rank, "pid": 42, "patches": rows}


def test_an_engine_serves_only_when_all_its_processes_have_the_same_patches() -> None:
    settings = EngineSettings(hf="/m", tp=2)
    server, first = _report("server", "0", "p1", "p2"), _report("scheduler", "tp0-pp0", "p1", "p2")
    check_reports(settings, [server, first, _report("scheduler", "tp1-pp0", "p1", "p2")])
    with pytest.raises(EngineError, match=r"scheduler tp1-pp0 \(pid 42\) runs without patches(?s:.*)missing \['p2'\](?s:.*)fix: run"):
        check_reports(settings, [server, first, _report("scheduler", "tp1-pp0", "p1")])
    with pytest.raises(EngineError, match=r"server 0 \(pid 42\) runs without patches"):
        check_reports(settings, [_report("server", "0", "p1"), first, first])
    with pytest.raises(EngineError, match=r"not every worker reported(?s:.*)2 scheduler reports(?s:.*)status"):
        check_reports(settings, [server, first])
