"""What one engine is started with, and what SGLang and its processes are told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rpp.errors import EngineError
from megatron_rpp.input_file import read_object

# Variables that describe the trainer's own process group, allocator or Slurm step. An SGLang worker that read them would
# join the wrong group, start under the wrong rank, or turn off its memory saver.
_FOREIGN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_FOREIGN_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_", "NCCL_ASYNC_", "SLURM_", "PMI_", "PMIX_", "OMPI_")
SOCKET_NAME = "engine.sock"  # in the private folder
FOLDER_VARIABLE = "MEGATRON_RPP_ENGINE_FOLDER"  # where an engine's processes find its private folder
_KV_MARGIN_TOKENS = 1024  # SGLang keeps some of the pool back

CPU_ARGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
    "enable_deterministic_inference": True,
    # Attention over a prompt must not depend on what was cached or scheduled with it: one query row takes another kernel
    # than many, and whether a prefix is found in the cache, or a prompt is cut in two, is a matter of timing.
    "disable_radix_cache": True,
    "chunked_prefill_size": -1,
}
CUDA_ARGS: dict[str, Any] = {"device": "cuda", "enable_memory_saver": True}

# What SGLang's classes ask a config for without a default, and what it means that a config.json leaves it out.
_ABSENT: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One engine. The whole travels as JSON on the command line of its process.

    hf: the HF directory it reads weights, shapes and end tokens from. dtype: torch's name of the weights' type.
    slot: which of the engines of this host it is; it picks cores. gpu_ids: of each rank, as numbered in the process that
    makes the settings; empty on a CPU.
    max_concurrent: requests in flight. max_sequence_tokens: prompt and response together, sizes the CPU key-value pool.
    sglang: ServerArgs fields that overrule everything chosen here.
    """

    hf: str
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tp: int = 1
    slot: int = 0
    slots_on_host: int = 1
    gpu_ids: tuple[int, ...] = ()
    max_concurrent: int = 128
    max_sequence_tokens: int = 2048
    seed: int = 0
    sglang: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"engine-{self.slot}"


def server_args(settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments of sglang.Engine. The tokenizer stays out: prompts go in and responses come out as token ids."""
    args: dict[str, Any] = {
        "model_path": settings.hf,
        "dtype": settings.dtype,
        "tp_size": settings.tp,
        "skip_tokenizer_init": True,
        "max_running_requests": settings.max_concurrent,
        "random_seed": settings.seed,
        "log_level": "warning",
        # A shared expert stays a parameter of its own, which is where weight updates put it: fused, SGLang counts it among the routed.
        "disable_shared_experts_fusion": True,
    }
    if settings.device == "cpu":
        args |= CPU_ARGS | {"max_total_tokens": settings.max_concurrent * settings.max_sequence_tokens + _KV_MARGIN_TOKENS}
    else:
        args |= CUDA_ARGS
    return args | settings.sglang


def model_overrides(settings: EngineSettings) -> str:
    """The value of SGLang's json_model_override_args: entries of config.json as its classes have to read them, as JSON.

    DeepSeek's get what their config.json leaves out; and SGLang restricts tokens to groups of experts whenever there are groups,
    which `topk_method: greedy` does not mean. Raises: EngineError when config.json cannot be read.
    """
    config = read_object(Path(settings.hf) / "config.json", EngineError)
    found = {name: value for name, value in _ABSENT.get(config["model_type"], {}).items() if config.get(name) is None}
    if {**config, **found}.get("topk_method") == "greedy":
        found |= {"n_group": 1, "topk_group": 1}
    return json.dumps(found | json.loads(settings.sglang.get("json_model_override_args") or "{}"))


def environment(settings: EngineSettings, env: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: the trainer's, without what is the trainer's own business."""
    clean = {key: value for key, value in env.items() if key not in _FOREIGN and not key.startswith(_FOREIGN_PREFIXES)}
    clean["SGLANG_PLUGINS"] = "megatron_rpp"  # other people's plugins stay out of a run's numbers
    clean.setdefault("PYTHONWARNINGS", "ignore::UserWarning")  # hundreds of lines that would hide the log's last error
    clean["GLOO_SOCKET_IFNAME"] = "lo"  # an engine is on one host, and its workers meet there
    if settings.device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        clean["SGLANG_CPU_OMP_THREADS_BIND"] = thread_binding(settings, cores)
        clean["OMP_NUM_THREADS"] = str(num_threads(settings, len(cores)))
        # SGLang compiles how DeepSeek's tokens choose experts: on a CPU that takes a C++ compiler and half a minute at the first token.
        clean["TORCH_COMPILE_DISABLE"] = "1"
    elif settings.gpu_ids:
        # Ids count the GPUs that the trainer sees, which need not be all.
        seen = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        clean["CUDA_VISIBLE_DEVICES"] = ",".join(seen[number] if seen else str(number) for number in settings.gpu_ids)
    return clean


def num_threads(settings: EngineSettings, num_cores: int) -> int:
    """Threads of one tensor-parallel rank on a CPU.

    One while results must not depend on the batch: BLAS cuts the rows among its threads, and the last thread may get so
    few that it adds up in another order. Otherwise half of the rank's share; the rest is for the server, the trainer and
    the rewards.
    """
    if server_args(settings)["enable_deterministic_inference"]:
        return 1
    return max(1, num_cores // (2 * settings.slots_on_host * settings.tp))


def thread_binding(settings: EngineSettings, cores: list[int]) -> str:
    """The cores of each tensor-parallel rank in SGLang's notation, such as "0|4".

    The cores of the host are divided among all ranks of all its engines; with fewer cores than ranks some share.
    """
    ranks = settings.slots_on_host * settings.tp
    stride = max(1, len(cores) // ranks)
    return "|".join(str(cores[(settings.slot * settings.tp + rank) * stride % len(cores)]) for rank in range(settings.tp))
