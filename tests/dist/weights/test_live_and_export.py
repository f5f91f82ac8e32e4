"""Live parameters of several processes: the layout they report, whole tensors on leaders, an HF directory from rank 0."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_rpp.config.schema import Parallel
from megatron_rpp.errors import CheckpointError, GeometryError
from megatron_rpp.weights.export import export_bytes, export_hf
from megatron_rpp.weights.gather import iter_hf_tensors
from megatron_rpp.weights.hf_io import open_hf
from megatron_rpp.weights.layout import MegatronLayout
from megatron_rpp.weights.live import LiveWeights, live_weights
from megatron_rpp.weights.load import fill
from megatron_rpp.weights.rect import Rect, as_matrix
from tests.dist.ranks import run_ranks
from tests.dist.weights.live_models import DEADLINE_S, live_of, named
from tests.unit.weights.models import CONFIGS, model_of, random_hf, same, write_source

NAME = "qwen2.5, biases and tied"
PARALLEL = Parallel(tp=2, pp=2)
UNEVEN = ((0, 1, 2, 5), (3, 4, 6, 7))  # no default placement


def uneven() -> MegatronLayout:
    return MegatronLayout(model_of(NAME), 2, UNEVEN, torch.float32, 512)


def gather_on_two(rank: int) -> list[int]:
    live = live_of(uneven(), PARALLEL)
    assert live.layout == uneven()
    hf, sizes, received = random_hf(live.layout.model), [], {}
    for bucket in iter_hf_tensors(live, (0, 3), dtype=torch.bfloat16, bucket_bytes=5000, deadline_s=DEADLINE_S):
        sizes.append(sum(tensor.numel() * 2 for tensor in bucket.values()))
        received |= bucket
    assert received.keys() == (hf.keys() if rank in (0, 3) else set())
    assert all(same(received[key], hf[key].bfloat16()) for key in received)
    return sizes


def test_leaders_get_every_hf_tensor_of_the_real_layers_and_the_others_take_part_in_as_many_rounds() -> None:
    sizes = run_ranks(4, gather_on_two)
    assert sizes[1] == sizes[2] == [0] * len(sizes[0])
    assert sizes[0] == sizes[3]
    largest = 301 * 24 * 2  # the embedding, larger than the bound
    assert sorted(sizes[0])[-1] == largest
    assert sorted(sizes[0])[-2] <= 5000


def experts(stages: tuple[tuple[int, ...], ...]) -> MegatronLayout:
    """Four ranks a stage: two of tensor parallelism, of experts two of ep and two that cut each. No replica of any expert."""
    return MegatronLayout(model_of("deepseek_v3, router bias"), 2, stages, torch.float32, 512, replicas=2, ep=2, etp=2)


def gather_experts(rank: int, pp: int) -> None:
    layout = experts(((0, 1, 2, 3),) if pp == 1 else ((0,), (1, 2, 3)))  # a first stage without experts knows nothing of ep
    live = live_of(layout, Parallel(tp=2, dp=2, pp=pp))
    assert live.layout == layout
    hf, received = random_hf(layout.model), {}
    for bucket in iter_hf_tensors(live, (1,), bucket_bytes=20_000, deadline_s=DEADLINE_S):
        received |= bucket
    assert received.keys() == (hf.keys() if rank == 1 else set())
    assert all(same(received[key], hf[key]) for key in received)


def test_the_share_of_the_experts_is_read_off_the_modules_and_each_arrives_under_its_own_number() -> None:
    run_ranks(4, gather_experts, 1)
    run_ranks(8, gather_experts, 2)


def export_then_load(rank: int, folder: str, source: str) -> None:
    live = live_of(uneven(), PARALLEL)
    export_hf(live, folder, source=source, bucket_bytes=5000, shard_bytes=20_000, deadline_s=DEADLINE_S)
    assert (Path(folder) / "config.json").is_file(), "export returned on this rank before the directory was complete"
    payloads = [path.read_bytes() for path in Path(folder).glob("*.safetensors")]
    headers = sum(8 + int.from_bytes(payload[:8], "little") for payload in payloads)
    assert export_bytes(live) == sum(map(len, payloads)) - headers
    before = {key: tensor.clone() for key, tensor in live.tensors.items()}
    for tensor in live.tensors.values():
        tensor.fill_(float("nan"))
    with open_hf(folder) as checkpoint:
        fill(live, checkpoint)
    assert all(same(live.tensors[key], before[key].nan_to_num(0.0)) for key in before)


def test_an_export_is_hf_bitwise_and_loads_back_bitwise(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", CONFIGS[NAME])
    run_ranks(4, export_then_load, str(tmp_path / "out"), str(source))
    hf = random_hf(model_of(NAME))
    with open_hf(tmp_path / "out") as checkpoint:
        checkpoint.check(model_of(NAME).hf_shapes)
        for key, tensor in hf.items():
            whole = checkpoint.read(Rect(key, 0, 0, *as_matrix(tuple(tensor.shape))))
            assert same(whole.view(tensor.shape), tensor), key


def export_fails(live: LiveWeights, folder: str, source: str) -> None:
    """The writer finds the directory taken: every rank hears of it, and none waits for its deadline."""
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"export failed: .*already exists"):
        export_hf(live, folder, source=source, bucket_bytes=5000, deadline_s=DEADLINE_S)
    assert time.monotonic() - start < DEADLINE_S / 2


def plans_differ(live: LiveWeights) -> None:
    with pytest.raises(GeometryError, match="ranks made different plans"):
        list(iter_hf_tensors(live, (0,), bucket_bytes=5000 * (1 + live.rank), deadline_s=DEADLINE_S))


def stages_disagree(live: LiveWeights) -> None:
    """Rank 1 says it holds layer 7 where its stage's other rank holds layer 5."""
    parameters = named(uneven(), live.rank)
    if live.rank == 1:
        parameters = [(name, 7 if layer == 5 else layer, tensor) for name, layer, tensor in parameters]
    with pytest.raises(GeometryError, match="ranks of one stage hold different layers"):
        live_weights(model_of(NAME), parameters, live.groups, dtype=torch.float32, deadline_s=DEADLINE_S)


def failures(rank: int, folder: str, source: str) -> None:
    live = live_of(uneven(), PARALLEL)
    stages_disagree(live)
    plans_differ(live)
    export_fails(live, folder, source)


def test_what_goes_wrong_on_one_rank_is_an_error_on_all_of_them_and_none_hangs(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", CONFIGS[NAME])
    (tmp_path / "out").mkdir()
    run_ranks(4, failures, str(tmp_path / "out"), str(source))
