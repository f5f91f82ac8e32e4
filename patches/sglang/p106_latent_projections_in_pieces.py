"""DeepSeek's two down-projections may reach load_weights in different calls.

SGLang keeps q_a_proj and kv_a_proj_with_mqa of a layer in one parameter and fills it once both have come, but remembers the
first of them only to the end of the call. A weight update comes in buckets, a call for each: where a bucket ends between the two,
both are dropped without a word and the engine samples from the old weights. Here the first waits for the second.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from megatron_rpp_patches._record import Patch

HALVES = ("q_a_proj", "kv_a_proj_with_mqa")
_WAITING = "_rpp_waiting_projections"  # attribute of the model: name -> tensor


def in_pairs(weights: Iterable[tuple[str, Tensor]], waiting: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights, with every half kept back in `waiting` until its other half comes, in this call or a later one."""
    new: set[str] = set()
    for name, tensor in weights:
        other = _other(name)
        if other is None:
            yield name, tensor
        elif other in waiting:
            new.discard(other)
            yield other, waiting.pop(other)
            yield name, tensor
        else:
            new.add(name)
            waiting[name] = tensor
    waiting.update({name: waiting[name].clone() for name in new})  # the memory of a bucket is the next one's too


def _other(name: str) -> str | None:
    for half, other in (HALVES, HALVES[::-1]):
        if f".{half}." in name:
            return name.replace(f".{half}.", f".{other}.")
    return None


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def do_load_weights(self: Any, weights: Iterable[tuple[str, Tensor]], is_nextn: bool = False) -> Any:
        if getattr(self.config, "q_lora_rank", None) is not None:
            weights = in_pairs(weights, self.__dict__.setdefault(_WAITING, {}))
        return original(self, weights, is_nextn)

    return do_load_weights


def _probe() -> None:
    loader = importlib.import_module("sglang.srt.models.deepseek_common.deepseek_weight_loader").DeepseekV2WeightLoaderMixin
    assert getattr(loader.do_load_weights, "__rpp_patch__", None) == PATCH.id, loader.do_load_weights


PATCH = Patch(
    id="p106-latent-projections-in-pieces",
    library="sglang",
    target="sglang.srt.models.deepseek_common.deepseek_weight_loader:DeepseekV2WeightLoaderMixin.do_load_weights",
    kind="wrap",
    why="q_a_proj and kv_a_proj_with_mqa of a DeepSeek are dropped in silence when two buckets of an update bring them",
    upstream="not reported: cached_a_proj of do_load_weights lives as long as one call",
    versions=">=0.5.21,<0.5.22",
    remove_when="load_weights of DeepSeek keeps an unmatched projection for the next call",
    expires=datetime.date(2027, 9, 1),
    probe=_probe,
    test="tests/sglang/test_patches.py::test_projections_in_two_calls_are_lost_without_the_patch",
    make=_make,
)
