"""The distributed optimizer over torch's AdamW can be saved, loaded and continued."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable

from megatron_rpp_patches._record import Patch
from megatron_rpp_patches.megatron_core._host import has_fused_adam

CLASS = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
COMMON = {
    "library": "megatron-core",
    "kind": "wrap",
    "versions": "==0.16.1",
    "remove_when": "the named fault is gone upstream, or Apex or Transformer Engine is required",
    "expires": datetime.date(2027, 11, 30),
    "inactive": has_fused_adam,
}


def _start_state(original: Callable) -> Callable:
    @functools.wraps(original)
    def state_dict(self):
        import torch

        if not self.optimizer.state:  # AdamW makes its state in its first step; a load wants the keys before that
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
        return original(self)

    return state_dict


def _keep_step(original: Callable) -> Callable:
    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        own = {"step": state["step"]} if "step" in state else {}
        return original(self, model_param, {**own, **tensors})  # what is not in the file keeps its value

    return _set_main_param_and_optimizer_states


def _own_step(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_state_dict(self, state_dict):
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if hasattr(state.get("step"), "clone"):
                state["step"] = state["step"].clone()  # one tensor shared by all would advance once for each parameter

    return load_state_dict


def _distributed_optimizer(values):
    """A DistributedOptimizer as far as its inner optimizer, for probes that must not need process groups."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer = object.__new__(DistributedOptimizer)
    params = [torch.nn.Parameter(torch.full((2,), value)) for value in values]
    optimizer.optimizer = torch.optim.AdamW(params)
    optimizer.model_param_group_index_map = {param: (0, order) for order, param in enumerate(params)}
    optimizer.grad_scaler = None
    optimizer.config = type("Config", (), {"use_precision_aware_optimizer_no_fp8_or_ds_fp8": False, "fp16": False})
    optimizer.ddp_config = type("Config", (), {"use_megatron_fsdp": False})
    for group in optimizer.optimizer.param_groups:
        group.update(wd_mult=1.0, lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False)
    return optimizer, params


def _probe_start() -> None:
    optimizer, params = _distributed_optimizer([1.0, 2.0])
    assert [group["step"] for group in optimizer.state_dict()["optimizer"]["param_groups"]] == [0.0]
    assert optimizer.optimizer.state[params[1]]["exp_avg"].tolist() == [0.0, 0.0]


def _probe_keep() -> None:
    import torch

    optimizer, params = _distributed_optimizer([1.0])
    optimizer.state_dict()
    loaded = {name: torch.tensor([value, value]) for name, value in (("param", 5.0), ("exp_avg", 6.0), ("exp_avg_sq", 7.0))}
    with torch.no_grad():
        optimizer._set_main_param_and_optimizer_states(params[0], loaded)
    state = optimizer.optimizer.state[params[0]]
    assert params[0].tolist() == [5.0, 5.0]
    assert [state["exp_avg"][0], state["exp_avg_sq"][0], state["step"]] == [6.0, 7.0, 0.0], state


def _probe_own() -> None:
    optimizer, params = _distributed_optimizer([1.0, 2.0])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.optimizer.state[params[0]]["step"] += 1
    assert optimizer.optimizer.state[params[1]]["step"] == 0, "the parameters share one step tensor"


PATCHES = (
    Patch(
        **COMMON,
        id="p050-optimizer-start",
        target=f"{CLASS}.state_dict",
        why="state_dict() before the first step fails its assertion on the number of distinct steps, so nothing can be loaded",
        upstream="not reported: distrib_optimizer.py, `assert len(steps) == 1` with no state yet",
        probe=_probe_start,
        test="tests/patches/test_necessity.py::test_without_the_patch[p050-optimizer-start]",
        make=_start_state,
    ),
    Patch(
        **COMMON,
        id="p051-optimizer-keep-step",
        target=f"{CLASS}._set_main_param_and_optimizer_states",
        why="loading a checkpoint dies with KeyError 'step': torch keeps the step beside the moments, the file does not",
        upstream="not reported: distrib_optimizer.py copies every key of the state",
        probe=_probe_keep,
        test="tests/patches/test_necessity.py::test_without_the_patch[p051-optimizer-keep-step]",
        make=_keep_step,
    ),
    Patch(
        **COMMON,
        id="p052-optimizer-own-step",
        target=f"{CLASS}.load_state_dict",
        why="after a load all parameters share one step tensor, which advances once a parameter: loss 5.5656, not 5.5603, a step later",
        upstream="not reported: distrib_optimizer.py, `s['step'] = step` in a loop",
        probe=_probe_own,
        test="tests/patches/test_necessity.py::test_without_the_patch[p052-optimizer-own-step]",
        make=_own_step,
    ),
)
