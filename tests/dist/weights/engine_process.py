"""An engine's processes without SGLang: the code that runs in its schedulers, on bare parameters of SGLang's shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rpp.errors import EngineError
from megatron_rpp.rollout.coverage import Shards
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.unit.weights.models import blank


class Model:
    """Parameters by SGLang's names, whose dots an nn.Module would not take."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.parameters.items())


class EngineProcess:
    """What DirectPath sees of an Engine. before_load: called with the number of each bucket, from 1, before it is copied."""

    def __init__(self, layout: SGLangLayout, before_load: Callable[[int], None] = lambda number: None) -> None:
        self.models = [Model(blank(layout.engine_locals(rank))) for rank in range(layout.tp)]
        self.before_load, self.num_loads = before_load, 0

    @contextmanager
    def update_shards(self, version: int, announced: Sequence[Any], *, deadline_s: float) -> Iterator[Callable[[Sequence[Any]], None]]:
        expected = json.loads(json.dumps(list(announced)))  # as it travels
        updates = [Shards(str(version), each, model) for each, model in zip(expected, self.models, strict=True)]
        self.num_loads = 0

        def load(buckets: Sequence[Any]) -> None:
            self.num_loads += 1
            self.before_load(self.num_loads)
            try:
                for update, model, bucket in zip(updates, self.models, json.loads(json.dumps(list(buckets))), strict=True):
                    update.take(model, bucket)
            except ValueError as error:
                raise EngineError(str(error), where="engine") from error

        yield load
        for update, model in zip(updates, self.models, strict=True):
            update.finish(model)

    def holds(self, expected: Sequence[dict[str, Tensor]]) -> bool:
        """True when every rank has exactly these values, padding zero."""
        return all(
            torch.equal(model.parameters[name], tensor.nan_to_num(0.0))
            for model, tensors in zip(self.models, expected, strict=True)
            for name, tensor in tensors.items()
        )
