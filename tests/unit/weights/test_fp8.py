"""Resharding in block FP8: whatever the layouts, an engine holds the slices of the quantised whole tensors, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8 import WIDE_ENDING, Fp8Pair, Fp8Source, Fp8Target, Fp8Tensors, Narrowing, final_locals, quantised_at_source
from megatron_rpp.weights.layout import Layout, MegatronLayout
from megatron_rpp.weights.planner import plan
from megatron_rpp.weights.quantise import is_quantised
from megatron_rpp.weights.rect import view
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.unit.weights.fp8_oracle import bits, covered, cut, quantised
from tests.unit.weights.models import filled, random_hf

BF16 = torch.bfloat16
BUCKET_BYTES = 1 << 17  # a piece that is quantised on arrival comes in several buckets
ALIGNED = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 300,
}
# Two trainer ranks cut both the MLP and the KV groups inside a block; one engine rank does not.
UNALIGNED = ALIGNED | {"intermediate_size": 384, "head_dim": 64}
MOE = ALIGNED | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 256}


def _reshard(model: Model, source: Layout, target: Layout, hf: dict[str, Tensor]) -> tuple[Fp8Target, list[dict[str, Tensor]]]:
    """What every rank of the target ends up with."""
    pair = Fp8Pair.of(source, target, model.hf_shapes)
    tensors = [Fp8Tensors(pair.source, rank, own) for rank, own in enumerate(filled(source, hf))]
    ranks = [
        {local.name: torch.zeros(local.shape, dtype=local.dtype) for local in final_locals(pair.target, rank)}
        for rank in range(target.ranks)
    ]
    narrowing = [Narrowing(pair.target) for _ in ranks]
    for bucket in plan(pair.source, pair.target, bucket_bytes=BUCKET_BYTES).buckets:
        for transfer in bucket.transfers:
            values = view(tensors[transfer.src][transfer.src_local], transfer.src_piece, transfer.rect).to(transfer.dtype)
            for made, part in narrowing[transfer.dst].take([(transfer, values)]):
                view(ranks[transfer.dst][made.dst_local], made.dst_piece, made.rect).copy_(part)
    return pair.target, ranks


CASES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int], bool]] = {
    # model, trainer, engine, whether everything is quantised where it lies
    "TP2 PP2 -> TP2": (ALIGNED, {"tp": 2, "pp": 2}, {"tp": 2}, True),
    "TP1 -> TP2": (ALIGNED, {"tp": 1}, {"tp": 2}, True),
    "TP2 -> TP1, off the grid": (UNALIGNED, {"tp": 2}, {"tp": 1}, False),
    "TP4 -> TP1, KV groups cut": (UNALIGNED, {"tp": 4}, {"tp": 1}, False),
    "experts, EP2 -> EP2": (MOE, {"tp": 1, "ep": 2, "replicas": 2}, {"tp": 2, "ep": 2}, True),
    "experts, ETP2 PP2 -> TP2": (MOE, {"tp": 2, "etp": 2, "pp": 2}, {"tp": 2}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_every_engine_rank_holds_slices_of_the_quantised_whole_tensors(case: str) -> None:
    config, trainer, engine, all_at_source = CASES[case]
    model = describe(config)
    source = MegatronLayout.even(model, dtype=BF16, **trainer)
    target = SGLangLayout(model, dtype=BF16, **engine)
    hf = random_hf(model, BF16)
    dst, ranks = _reshard(model, source, target, hf)
    wide = {local.name for rank in range(target.ranks) for local in dst.locals(rank) if local.name.endswith(WIDE_ENDING)}
    assert all_at_source == (not wide)
    whole = quantised(hf)
    for rank, tensors in enumerate(ranks):
        wanted = final_locals(dst, rank)
        assert {local.name for local in wanted} == tensors.keys()
        assert any(local.dtype == torch.float8_e4m3fn for local in wanted)
        for local in wanted:
            expected, got, mask = cut(local, whole), tensors[local.name], covered(local)
            assert got.dtype == expected.dtype == local.dtype
            assert torch.equal(bits(got)[mask], bits(expected)[mask]), f"{local.name} on rank {rank}"


def test_the_wire_carries_half_the_bytes_of_what_is_quantised() -> None:
    """[rows, cols] in bfloat16 is 2 bytes an element; E4M3 is 1, and 4 bytes of scale for 128 x 128 of them."""
    model = describe(ALIGNED)
    source, target = MegatronLayout.even(model, dtype=BF16, tp=2), SGLangLayout(model, dtype=BF16, tp=1)
    chosen = quantised_at_source(source, model.hf_shapes)
    assert chosen == {name for name in model.hf_shapes if is_quantised(name)}
    plain, fp8 = plan(source, target), plan(Fp8Source(source, chosen), Fp8Target(target, chosen, tuple(model.hf_shapes.items())))
    elements = sum(rows * cols for rows, cols in (model.hf_shapes[name] for name in chosen))
    total = [sum(transfer.num_bytes for transfer in each.transfers) for each in (plain, fp8)]
    assert total[0] - total[1] == elements - 4 * elements // 128**2


def test_an_engine_that_cuts_inside_a_block_is_refused_with_the_parameter() -> None:
    model = describe(UNALIGNED)
    target = Fp8Target(SGLangLayout(model, dtype=BF16, tp=2), frozenset(), tuple(model.hf_shapes.items()))
    with pytest.raises(GeometryError, match=r"qkv_proj\.weight: the engine cuts this parameter inside a block"):
        target.locals(0)
