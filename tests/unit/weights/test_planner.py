from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import pytest
import torch

from megatron_rpp.errors import GeometryError
from megatron_rpp.weights.buckets import ALIGN_BYTES
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.layout import HFLayout, Layout, MegatronLayout
from megatron_rpp.weights.planner import plan
from megatron_rpp.weights.rect import Rect
from tests.unit.weights.models import CONFIGS, carry_out, filled, model_of, random_hf, same
from tests.unit.weights.slices import EngineSlices
from tests.unit.weights.tables import table

TRAIN = [(tp, pp, vpp) for tp, pp, vpp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2)) if pp > 1 or vpp == 1]


def destinations(name: str, ranks: int) -> list[Layout]:
    """Whole tensors on one and on several leaders, engine slices, and another training layout."""
    model, dtype = model_of(name), torch.bfloat16
    found: list[Layout] = [HFLayout.of(model, dtype=dtype, ranks=ranks, holders=(0,))]
    found += [HFLayout.of(model, dtype=dtype, ranks=ranks, holders=tuple(range(0, ranks, 2)))]
    found += [EngineSlices(model, tp, ranks, dtype) for tp in (1, 2, 4) if tp <= ranks]
    found += [MegatronLayout.even(model, tp=1, pp=ranks, dtype=dtype)] if 8 % ranks == 0 else []
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_pair_of_layouts_carries_every_element_bitwise(name: str) -> None:
    """From NaN-filled tensors, with tensors cut and whole in turn. Half of the full table, another half for every other model:
    about 270 in all."""
    model, pairs = model_of(name), 0
    hf = random_hf(model, torch.bfloat16)
    for tp, pp, vpp in TRAIN:
        src = MegatronLayout.even(model, tp=tp, pp=pp, vpp=vpp, dtype=torch.bfloat16)
        sources = filled(src, hf)
        for number, dst in enumerate(destinations(name, src.ranks)):
            if (number + pp + list(CONFIGS).index(name)) % 2:
                continue
            made = plan(src, dst, bucket_bytes=4096, whole_tensors=pairs % 2 == 0)
            found, expected = carry_out(made, sources, dst), filled(dst, hf)
            for rank in range(dst.ranks):
                assert all(same(found[rank][key], expected[rank][key]) for key in expected[rank]), (src.tp, src.layers, dst, rank)
            pairs += 1
    assert pairs >= 30


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_hf_to_megatron_to_hf_is_bitwise_for_every_pipeline(name: str, tp: int) -> None:
    model = model_of(name)
    hf = random_hf(model)
    for pp, vpp in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2)):
        src = MegatronLayout.even(model, tp=tp, pp=pp, vpp=vpp, dtype=torch.float32)
        dst = HFLayout.of(model, dtype=torch.float32, ranks=src.ranks, holders=(src.ranks - 1,))
        back = carry_out(plan(src, dst), filled(src, hf), dst)[-1]
        assert back.keys() == hf.keys()
        assert all(same(back[key], hf[key]) for key in hf)


def test_kv_heads_that_are_fewer_than_tp_are_cut_inside_their_group() -> None:
    """8 heads, 2 KV heads, tp 4: half a KV group each. Six head rows a group, three a rank: Q Q Q | Q K V."""
    model = model_of("qwen3, tied, 2 KV heads")
    layout = MegatronLayout.even(model, tp=4, dtype=torch.float32)
    head = model.dims.head
    held = []
    for rank in range(2):
        (qkv,) = [local for local in layout.locals(rank) if local.name == "decoder.layers.0.self_attention.linear_qkv.weight"]
        held.append([(piece.rect.hf.split(".")[4], piece.rect.row // head, piece.rect.rows // head) for piece in qkv.pieces])
    assert held == [[("q_proj", 0, 3)], [("q_proj", 3, 1), ("k_proj", 0, 1), ("v_proj", 0, 1)]]


def test_a_replicated_source_is_read_once_and_the_nearest_copy_is_taken() -> None:
    """Two replicas on two nodes, a leader on each: no byte crosses nodes, and none is sent twice."""
    model = model_of("llama")
    src = MegatronLayout.even(model, tp=2, replicas=2, dtype=torch.float32)  # ranks 0 1 | 2 3
    dst = HFLayout.of(model, dtype=torch.float32, ranks=4, holders=(0, 2))
    nodes = (0, 0, 1, 1)
    found = plan(src, dst, nodes=nodes)
    assert {(t.src, t.dst) for t in found.transfers} == {(0, 0), (1, 0), (2, 2), (3, 2)}
    size = sum(local.num_bytes for local in dst.locals(0))
    assert sum(t.num_bytes for t in found.transfers) == 2 * size
    assert all(t.src == t.dst for t in found.transfers if t.src_local.endswith("norm.weight") or "layer_norm" in t.src_local)


def test_either_copy_of_a_tied_embedding_may_serve() -> None:
    model = model_of("llama, tied")
    src = MegatronLayout.even(model, tp=1, pp=2, dtype=torch.float32)
    for holder, local in ((0, "embedding.word_embeddings.weight"), (1, "output_layer.weight")):
        dst = HFLayout.of(model, dtype=torch.float32, ranks=2, holders=(holder,))
        (embedding,) = [t for t in plan(src, dst).transfers if t.dst_local == "model.embed_tokens.weight"]
        assert (embedding.src, embedding.src_local) == (holder, local)


def test_buckets_of_whole_tensors_stay_below_their_bound_unless_one_tensor_is_larger() -> None:
    model = model_of("llama")
    src = MegatronLayout.even(model, tp=2, pp=2, dtype=torch.float32)
    dst = HFLayout.of(model, dtype=torch.float32, ranks=4, holders=(0, 2))
    bound = 8192
    found = plan(src, dst, bucket_bytes=bound, whole_tensors=True)
    assert len(found.buckets) > 3
    for bucket in found.buckets:
        arriving = Counter()
        for transfer in bucket.transfers:
            arriving[transfer.dst] += transfer.num_bytes
        alone = all(len(locals_) == 1 for locals_ in bucket.completed.values())
        assert alone or max(arriving.values()) <= bound
        assert alone or max(bucket.sent_bytes(rank) for rank in range(4)) <= bound + 4 * ALIGN_BYTES


def test_each_tensor_is_complete_in_one_bucket_and_each_bucket_names_it() -> None:
    model = model_of("qwen2, biases")
    src = MegatronLayout.even(model, tp=2, pp=2, dtype=torch.float32)
    dst = EngineSlices(model, 4, 4, torch.float32)
    found = plan(src, dst, bucket_bytes=4096, whole_tensors=True)
    for rank in range(4):
        own = plan(src, dst, rank=rank, bucket_bytes=4096, whole_tensors=True)
        assert [bucket.completed for bucket in own.buckets] == [
            {rank: bucket.completed[rank]} if rank in bucket.completed else {} for bucket in found.buckets
        ]
        completed = [local for bucket in found.buckets for local in bucket.completed.get(rank, ())]
        assert sorted(local.name for local in completed) == sorted(local.name for local in dst.locals(rank))
    for bucket in found.buckets:
        names = {(rank, local.name) for rank, locals_ in bucket.completed.items() for local in locals_}
        assert {(t.dst, t.dst_local) for t in bucket.transfers} <= names


def test_every_stage_sends_its_share_in_every_bucket_of_whole_tensors() -> None:
    """Model order would let one stage send at a time: a max / mean of pp. Stages differ here by an embedding and a head."""
    config = {**CONFIGS["llama"], "num_hidden_layers": 32, "vocab_size": 32}
    model = describe(config)
    src = MegatronLayout.even(model, tp=1, pp=4, dtype=torch.bfloat16)
    dst = HFLayout.of(model, dtype=torch.bfloat16, ranks=5, holders=(4,))
    total = sum(local.num_bytes for local in dst.locals(4))
    found = plan(src, dst, bucket_bytes=total // 5, whole_tensors=True)
    assert len(found.buckets) >= 5
    for bucket in found.buckets[:-1]:
        sent = [bucket.sent_bytes(rank) for rank in range(4)]
        assert max(sent) / (sum(sent) / 4) < 1.2, sent


def test_a_plan_is_made_once() -> None:
    model = model_of("llama")
    make = lambda: MegatronLayout.even(model, tp=2, dtype=torch.float32)  # noqa: E731
    dst = HFLayout.of(model, dtype=torch.float32, ranks=2, holders=(0,))
    assert plan(make(), dst) is plan(make(), dst)
    assert plan(make(), dst) is not plan(make(), dst, bucket_bytes=1024)


DIGEST = """
import torch
from megatron_rpp.weights.layout import HFLayout, MegatronLayout
from megatron_rpp.weights.planner import plan
from tests.unit.weights.models import model_of
src = MegatronLayout.even(model_of("qwen2, biases"), tp=2, pp=2, replicas=2, dtype=torch.bfloat16)
dst = HFLayout.of(src.model, dtype=torch.bfloat16, ranks=8, holders=(0, 4))
for whole in (False, True):
    print(plan(src, dst, nodes=(0, 0, 0, 0, 1, 1, 1, 1), bucket_bytes=5000, whole_tensors=whole).digest)
"""


def test_two_processes_make_the_same_plan_whatever_their_hash_seed() -> None:
    digests = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": "."}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True, timeout=120)
        digests.add(run.stdout)
    assert len(digests) == 1
    assert len(set(digests.pop().split())) == 2


def test_a_source_with_a_hole_is_refused_with_the_tensor_and_the_count() -> None:
    src = table(Rect("w", 0, 0, 2, 4), Rect("w", 3, 0, 1, 4))
    with pytest.raises(GeometryError, match=r"no source holds all of w\[0:4, 0:4\]\n  expected: 16\n  got: 12"):
        plan(src, table(Rect("w", 0, 0, 4, 4)))


def test_a_source_with_overlapping_shards_is_refused() -> None:
    src = table(Rect("w", 0, 0, 3, 4), Rect("w", 2, 0, 2, 4))
    with pytest.raises(GeometryError, match="overlap"):
        plan(src, table(Rect("w", 0, 0, 4, 4)))


def test_a_tensor_that_no_source_has_is_refused() -> None:
    with pytest.raises(GeometryError, match="no source holds all of v"):
        plan(table(Rect("w", 0, 0, 4, 4)), table(Rect("v", 0, 0, 4, 4)))


def test_the_nodes_must_be_as_many_as_the_ranks() -> None:
    with pytest.raises(GeometryError, match="one node for each rank"):
        plan(table(Rect("w", 0, 0, 4, 4)), table(Rect("w", 0, 0, 4, 4)), nodes=(0, 0))
