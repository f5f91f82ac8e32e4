"""From every kind of training layout to every kind of engine, bitwise: both ends cut by the slow oracles, only the plan between.

tools/check_reshard.py --matrix does the same for several hundred pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.layout import HFLayout, Layout, MegatronLayout, pad_vocab
from megatron_rpp.weights.planner import plan
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.unit.weights.models import ALL_CONFIGS, MOE_CONFIGS, blank, carry_out, model_of, random_hf, same
from tests.unit.weights.oracle import megatron_ranks
from tests.unit.weights.sglang_oracle import sglang_ranks

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Train:
    """One training split. stages: the layers of each, as quarters of the model: 4 and 8 layers take the same table."""

    tp: int = 1
    stages: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)
    replicas: int = 1
    ep: int = 1
    etp: int = 1

    def layers(self, model: Model) -> tuple[tuple[int, ...], ...]:
        each = model.dims.layers // 4
        return tuple(tuple(quarter * each + n for quarter in stage for n in range(each)) for stage in self.stages)

    def layout(self, model: Model) -> MegatronLayout:
        experts = {"ep": self.ep, "etp": self.etp} if model.dims.experts else {}
        rows = pad_vocab(model.dims.vocab, 128 * self.tp)
        return MegatronLayout(model, self.tp, self.layers(model), DTYPE, rows, replicas=self.replicas, **experts)

    def tensors(self, name: str, hf: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        stages = [list(stage) for stage in self.layers(model_of(name))]
        ep, etp = (self.ep, self.etp) if name in MOE_CONFIGS else (1, 1)
        return megatron_ranks(ALL_CONFIGS[name], hf, stages, tp=self.tp, replicas=self.replicas, ep=ep, etp=etp)


INTERLEAVED, UNEVEN = ((0, 2), (1, 3)), ((0,), (1, 2, 3))
TRAIN = [
    Train(replicas=4, ep=4),
    Train(tp=2, stages=INTERLEAVED, replicas=2, ep=2, etp=2),
    Train(tp=4, stages=UNEVEN, ep=4),
    Train(tp=2, replicas=2, stages=((0,), (1,), (2,), (3,)), ep=2),
    Train(tp=8, etp=8),
    Train(tp=8, stages=UNEVEN, ep=2, etp=2),
]
ENGINES = [(1, 1, 1), (2, 2, 1), (4, 1, 1), (8, 4, 1), (4, 2, 2), (8, 8, 4)]  # tp, ep, attn_dp


def engine_of(name: str, split: tuple[int, int, int], engines: int) -> tuple[SGLangLayout, list[dict[str, Tensor]]]:
    """An engine, or several, and what each rank must hold; the second engine's ranks run backwards."""
    model, (tp, ep, attn_dp) = model_of(name), split
    ep, attn_dp = ep if model.dims.experts else 1, attn_dp if model.has_attention_dp else 1
    places = (*range(tp), *reversed(range(tp, 2 * tp))) if engines == 2 else ()
    layout = SGLangLayout(model, tp, DTYPE, ep=ep, attn_dp=attn_dp, engines=engines, places=places)
    one = sglang_ranks(ALL_CONFIGS[name], random_hf(model, DTYPE), tp=tp, ep=ep, attn_dp=attn_dp)
    return layout, one + one[::-1] if engines == 2 else one


def assert_arrives(name: str, train: Train, dst: Layout, expected: list[dict[str, Tensor]]) -> None:
    model = model_of(name)
    src, hf = train.layout(model), random_hf(model, DTYPE)
    sources = train.tensors(name, hf)
    received = carry_out(plan(src, dst, bucket_bytes=4096), sources, dst)
    for rank, tensors in enumerate(expected):
        assert received[rank].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert same(received[rank][key], tensor), (name, train, dst.ranks, rank, key)


PAIRS = [
    (name, TRAIN[number % len(TRAIN)], ENGINES[engine], 1 + (number + engine) % 2)
    for number, name in enumerate(ALL_CONFIGS)
    if model_of(name).not_in_engine is None
    for engine in range(number % 2, len(ENGINES), 2)
]
PAIRS += [("deepseek_v3, router bias", *pair, 1) for pair in itertools.product(TRAIN[1:4], ENGINES[1::2])]
PAIRS += [("qwen3_moe", *pair, 1) for pair in itertools.product(TRAIN[1:4], ENGINES[1::2])]


@pytest.mark.parametrize(("name", "train", "split", "engines"), PAIRS)
def test_an_engine_receives_exactly_its_slices(name: str, train: Train, split: tuple[int, int, int], engines: int) -> None:
    dst, expected = engine_of(name, split, engines)
    assert_arrives(name, train, dst, expected)


def test_the_table_is_wide_enough() -> None:
    assert len(PAIRS) >= 55
    assert {train for _, train, _, _ in PAIRS} == set(TRAIN)
    kv_heads = {name: model_of(name).dims.kv_heads for name in ALL_CONFIGS}
    assert any(split[0] // split[2] > kv_heads[name] for name, _, split, _ in PAIRS)


@pytest.mark.parametrize("name", MOE_CONFIGS)
@pytest.mark.parametrize("number", range(3))
def test_training_layouts_reach_each_other(name: str, number: int) -> None:
    train, other = TRAIN[number], TRAIN[number + 3]
    dst = other.layout(model_of(name))
    assert_arrives(name, train, dst, other.tensors(name, random_hf(model_of(name), DTYPE)))


@pytest.mark.parametrize("name", MOE_CONFIGS)
@pytest.mark.parametrize("train", TRAIN, ids=str)
def test_hf_to_megatron_to_hf_is_bitwise(name: str, train: Train) -> None:
    model = model_of(name)
    hf = random_hf(model, DTYPE)
    src = train.layout(model)
    dst = HFLayout.of(model, dtype=DTYPE, ranks=src.ranks, holders=(src.ranks - 1,))
    assert_arrives(name, train, dst, [{}] * (src.ranks - 1) + [hf])


def test_what_no_source_holds_is_never_made_up() -> None:
    """The padding of the vocabulary stays as it was, whatever the source has there."""
    model = model_of("llama")
    src, dst = TRAIN[0].layout(model), SGLangLayout(model, 2, DTYPE)
    sources = [{key: tensor.nan_to_num(7.0) for key, tensor in one.items()} for one in TRAIN[0].tensors("llama", random_hf(model, DTYPE))]
    head = carry_out(plan(src, dst), sources, dst)[1]["lm_head.weight"]
    assert head.shape[0] == 160
    assert same(head[141:], blank(dst.locals(1))["lm_head.weight"][141:])
    assert not head[:141].isnan().any()
