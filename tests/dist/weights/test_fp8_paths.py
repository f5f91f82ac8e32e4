"""Both paths into engines in FP8, from a policy of four ranks that changes in between: the bits of the whole tensors, quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.config.schema import Parallel
from megatron_rpp.delivery import DirectPath, GatherPath
from megatron_rpp.dist.groups import host_group
from megatron_rpp.dist.layout import engine_group, engine_groups
from megatron_rpp.errors import RppError
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8 import WIDE_ENDING, Fp8Pair, Fp8Target, final_locals
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.dist.ranks import run_ranks
from tests.dist.weights.engine_process import EngineProcess, Model
from tests.dist.weights.live_models import live_of
from tests.unit.weights.fp8_oracle import bits, covered, cut, quantised
from tests.unit.weights.models import blank, random_hf
from tests.unit.weights.test_fp8 import ALIGNED, UNALIGNED

LIMITS = {"bucket_bytes": 1 << 17, "deadline_s": 30.0}
CASES = {"quantised where it lies": (ALIGNED, 2), "most of it quantised on arrival": (UNALIGNED, 1)}  # model, ranks of an engine


class Fp8Process(EngineProcess):
    """One with the parameters of an engine in FP8, which also takes whole tensors."""

    def __init__(self, target: Fp8Target, ranks: Sequence[int]) -> None:
        self.locals = [final_locals(target, rank) for rank in ranks]
        self.models = [Model(blank(tuple(locals_))) for locals_ in self.locals]
        self.before_load, self.num_loads, self.whole = lambda number: None, 0, {}

    @contextmanager
    def update(self, version: int, *, deadline_s: float) -> Iterator[Callable[[Sequence[tuple[str, Tensor]]], None]]:
        self.whole = {}
        yield lambda bucket: self.whole.update({name: tensor.clone() for name, tensor in bucket})

    def holds(self, expected: dict[str, Tensor]) -> bool:
        """The slices of these whole tensors, to the bit."""
        kept = [(local, model.parameters[local.name]) for locals_, model in zip(self.locals, self.models, strict=True) for local in locals_]
        return all(torch.equal(bits(tensor.data)[covered(local)], bits(cut(local, expected))[covered(local)]) for local, tensor in kept)

    def was_given(self, expected: dict[str, Tensor]) -> bool:
        same = (torch.equal(bits(self.whole[name]), bits(tensor)) for name, tensor in expected.items())
        return self.whole.keys() == expected.keys() and all(same)


def send_twice(rank: int, config: dict[str, Any], tp: int) -> int:
    """How many parameters this rank quantised on arrival."""
    model = describe(config)
    src = MegatronLayout.even(model, tp=2, pp=2, dtype=torch.float32)
    target = SGLangLayout(model, tp, torch.float32, engines=4 // tp)
    live, mine = live_of(src, Parallel(tp=2, pp=2)), engine_group(rank, tp, 4 // tp)
    pair = Fp8Pair.of(live.layout, target, model.hf_shapes)
    engine = Fp8Process(pair.target, mine.ranks) if mine.leader == rank else None
    groups = engine_groups(tp, 4 // tp)
    peers = host_group([group.ranks for group in groups])
    direct = DirectPath(live, engine, mine, target, peers=peers, fp8=pair, **LIMITS)
    gather = GatherPath(live, engine, tuple(group.leader for group in groups), is_fp8=True, **LIMITS)
    for factor in (1.0, 1.7):
        with torch.no_grad():
            for tensor in live.tensors.values():
                tensor.mul_(factor)
        expected = quantised({name: tensor * factor for name, tensor in random_hf(model).items()})
        for path, is_right in ((direct, Fp8Process.holds), (gather, Fp8Process.was_given)):
            path.send(1)
            assert engine is None or is_right(engine, expected), (factor, path)
    with torch.no_grad():
        next(tensor for name, tensor in live.tensors.items() if name.endswith("linear_fc1.weight")).fill_(float("nan"))
    with pytest.raises(RppError, match="not finite, so it has no FP8 form"):
        gather.send(2)
    return sum(local.name.endswith(WIDE_ENDING) for local in pair.target.locals(rank))


@pytest.mark.parametrize("case", CASES)
def test_either_path_leaves_slices_of_the_quantised_whole_tensors(case: str) -> None:
    config, tp = CASES[case]
    wide = run_ranks(4, send_twice, config, tp)
    assert all(wide) == (config is UNALIGNED)
    assert any(wide) == (config is UNALIGNED)
