from __future__ import annotations

import pytest
import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import HFLayout, MegatronLayout, pad_vocab
from tests.unit.weights.models import CONFIGS, model_of


def layers_of(layout: MegatronLayout, rank: int) -> set[int]:
    return {int(local.name.split(".")[2]) for local in layout.locals(rank) if local.name.startswith("decoder.layers.")}


def test_ranks_count_tp_first_then_replicas_then_stages() -> None:
    """tp 2, two replicas, pp 2: ranks 0-3 are stage 0; ranks 0 and 2 are tp rank 0 of different replicas and hold the same."""
    layout = MegatronLayout.even(model_of("llama"), tp=2, pp=2, replicas=2, dtype=torch.float32)
    assert layout.ranks == 8
    assert [layout.stage(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert layout.locals(0) == layout.locals(2) != layout.locals(1)
    assert layers_of(layout, 3) == {0, 1, 2, 3}
    assert layers_of(layout, 4) == {4, 5, 6, 7}


def test_interleaved_chunks_alternate_between_stages() -> None:
    layout = MegatronLayout.even(model_of("llama"), tp=1, pp=2, vpp=2, dtype=torch.float32)
    assert [layers_of(layout, rank) for rank in range(2)] == [{0, 1, 4, 5}, {2, 3, 6, 7}]


def test_uneven_stages_are_taken_as_they_are() -> None:
    model = model_of("llama")
    layout = MegatronLayout(model, 1, ((0,), (1, 2, 3, 4, 5, 6), (7,)), torch.float32, 384)
    assert [len(layers_of(layout, rank)) for rank in range(3)] == [1, 6, 1]
    assert {local.name for local in layout.locals(2)} >= {"output_layer.weight", "decoder.final_layernorm.weight"}


@pytest.mark.parametrize("layers", [((0, 1, 2, 3), (4, 5, 6)), ((0, 1, 2, 3, 4), (4, 5, 6, 7)), ((0, 1, 2, 3), (4, 5, 6, 8))])
def test_layers_must_be_held_exactly_once(layers: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(GeometryError, match="layers not held exactly once"):
        MegatronLayout(model_of("llama"), 1, layers, torch.float32, 384)


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "message"), [(3, 1, 1, "tp cuts a head"), (1, 3, 1, "do not make"), (1, 1, 2, "vpp > 1 needs pp > 1")]
)
def test_a_layout_that_does_not_divide_is_refused(tp: int, pp: int, vpp: int, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        MegatronLayout.even(model_of("llama"), tp=tp, pp=pp, vpp=vpp, dtype=torch.float32)


def test_a_parameter_that_tp_cannot_cut_is_named() -> None:
    """8 query, 2 key and 2 value heads of 3 rows are 36 rows: not for 8 ranks."""
    model = describe({**CONFIGS["llama"], "num_key_value_heads": 2})
    with pytest.raises(GeometryError, match=r"layers\.0\.self_attention\.linear_qkv\.weight: 36 rows or columns cannot be cut in 8 equal"):
        MegatronLayout.even(model, tp=8, dtype=torch.float32).locals(0)


@pytest.mark.parametrize(("tp", "padded_vocab"), [(1, 300), (2, 303)])
def test_the_padded_vocabulary_must_hold_the_vocabulary_in_equal_parts(tp: int, padded_vocab: int) -> None:
    with pytest.raises(GeometryError, match="padded vocabulary"):
        MegatronLayout(model_of("llama"), tp, (tuple(range(8)),), torch.float32, padded_vocab)


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(301, 1, 384), (301, 4, 512), (512, 4, 512), (513, 4, 1024)])
def test_the_vocabulary_is_padded_as_megatron_does(vocab: int, tp: int, rows: int) -> None:
    assert pad_vocab(vocab, 128 * tp) == rows


def test_layouts_compare_by_value() -> None:
    make = lambda **change: MegatronLayout.even(model_of("llama"), **{"tp": 2, "dtype": torch.float32, **change})  # noqa: E731
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(tp=1)
    assert make() != make(dtype=torch.bfloat16)


@pytest.mark.parametrize("holders", [(), (4,), (-1,)])
def test_whole_tensors_need_a_rank_to_hold_them(holders: tuple[int, ...]) -> None:
    with pytest.raises(GeometryError, match="holders are not ranks"):
        HFLayout.of(model_of("llama"), dtype=torch.float32, ranks=4, holders=holders)
