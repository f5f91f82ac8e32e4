"""One engine of two ranks in block FP8, dense layers and experts: what it computes, and that both kinds of update leave the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from megatron_rpp.delivery import announce
from megatron_rpp.engine_dir import write_engine_dir
from megatron_rpp.rollout.engine import Engine
from megatron_rpp.rollout.memory import Outbox
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8 import Fp8Target, final_locals
from megatron_rpp.weights.quantise import checkpoint_tensors, is_quantised
from megatron_rpp.weights.rect import Local, view
from megatron_rpp.weights.sglang_layout import SGLangLayout
from tests.mcore.hf import transformers
from tests.sglang import tiny
from tests.unit.weights.fp8_oracle import cut, quantised

TP = 2
# Engine and oracle add up float32 in other orders. Where that moves an activation over the middle between two E4M3 numbers, it
# moves by 6 %, and so do all that follow in its sequence: log-probabilities by up to 0.05. The others agree to a few roundings.
EXACT, FLIPPED = 1e-5, 0.1


@pytest.fixture(scope="module")
def experts_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with experts, of whole blocks on two ranks."""
    folder = tmp_path_factory.mktemp("fp8-hf")
    torch.manual_seed(0)
    config = transformers().Qwen3MoeConfig(
        **{"vocab_size": tiny.VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 1024, "tie_word_embeddings": False},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
        **{"mlp_only_layers": [], "eos_token_id": tiny.END, "bos_token_id": None, "pad_token_id": 0},
    )
    model = transformers().Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.05))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(experts_hf: Path, start_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Started from weights that were quantised into its directory, as for `rpp eval`."""
    folder = tmp_path_factory.mktemp("fp8") / "engine"
    write_engine_dir(folder, experts_hf, dtype=torch.float32, with_weights=True)
    engine = start_engine(hf=str(folder), tp=TP)
    yield engine
    engine.close()


@pytest.fixture
def outboxes() -> Iterator[list[Outbox]]:
    boxes = [Outbox() for _ in range(TP)]
    yield boxes
    for box in boxes:
        box.close()


def _round_trip(x: Tensor) -> Tensor:
    """Activations through E4M3, a token and 128 columns at a time."""
    rounded = torch.empty_like(x)
    for start in range(0, x.shape[-1], 128):
        group = x[..., start : start + 128]
        scale = group.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
        rounded[..., start : start + 128] = (group / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded


class RoundTrips(TorchFunctionMode):
    """Inside the block the inputs of all products with quantised matrices make the round trip."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        skipped = ("embed", "norm", "lm_head", "mlp.gate.")
        quantised_ones = [tensor for name, tensor in model.named_parameters() if not any(word in name for word in skipped)]
        self._places = {tensor.untyped_storage().data_ptr() for tensor in quantised_ones}
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[1].untyped_storage().data_ptr() in self._places:
            self.count += 1
            args = (_round_trip(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _load(folder: Path) -> nn.Module:
    classes = transformers()
    return classes.Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def _oracle(hf: Path, folder: Path) -> nn.Module:
    """transformers' model with the matrices that the FP8 ones stand for, made block by block."""
    whole = quantised(load_file(hf / "model.safetensors"))
    wide = {name: tensor.float() for name, tensor in whole.items() if not name.endswith("_scale_inv")}
    for name in filter(is_quantised, wide):
        for (row, col), scale in np.ndenumerate(whole[f"{name}_scale_inv"].numpy()):
            wide[name][row * 128 : (row + 1) * 128, col * 128 : (col + 1) * 128] *= float(scale)
    shutil.copytree(hf, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    return _load(folder)


def test_log_probabilities_are_those_of_the_quantised_model_and_not_of_the_other(engine: Engine, experts_hf: Path, tmp_path: Path) -> None:
    asked = tiny.requests(16, max_tokens=6)
    done = tiny.sample(engine, asked)
    oracle, plain = _oracle(experts_hf, tmp_path / "oracle"), _load(experts_hf)

    def gaps(model: nn.Module) -> Tensor:
        found = [tiny.logp_of(model, each.tokens, done[each.key].tokens) for each in asked]
        return torch.cat([torch.tensor(logp) - torch.tensor(done[each.key].logp) for logp, each in zip(found, asked, strict=True)]).abs()

    with RoundTrips(oracle) as trips:
        same = gaps(oracle)
    weights_only, unquantised = gaps(oracle), gaps(plain)
    assert trips.count > 0
    assert same.median() < EXACT
    assert same.max() < FLIPPED
    assert weights_only.median() > 100 * EXACT, "activations are quantised too"
    assert unquantised.median() > 100 * EXACT
    assert same.mean() < 0.2 * min(weights_only.mean(), unquantised.mean())


def test_shards_in_fp8_and_whole_tensors_in_fp8_leave_the_same_bits(engine: Engine, experts_hf: Path, outboxes: list[Outbox]) -> None:
    """Other weights than it was started with, first whole, as on the gather path; then the first again, then in shards."""
    first = load_file(experts_hf / "model.safetensors")
    other = {name: tensor * 0.9 + 0.01 * torch.randn(tensor.shape) for name, tensor in first.items()}
    started = engine.checksum()
    tiny.publish(engine, list(checkpoint_tensors(other.items())), 1)
    expected = engine.checksum()
    tiny.publish(engine, list(checkpoint_tensors(first.items())), 2)
    assert engine.checksum() == started != expected
    model = describe(json.loads((experts_hf / "config.json").read_text()))
    layout = SGLangLayout(model, TP, torch.float32)
    target = Fp8Target(layout, frozenset(), tuple(model.hf_shapes.items()))
    whole = quantised(other)
    kept = [final_locals(target, rank) for rank in range(TP)]
    with engine.update_shards(3, [announce(locals_) for locals_ in kept]) as load:
        load([box.pack([part for local in locals_ for part in _parts(local, whole)]) for box, locals_ in zip(outboxes, kept, strict=True)])
    assert engine.checksum() == expected
    assert {done.version for done in tiny.sample(engine, tiny.requests(2)).values()} == {3}


def _parts(local: Local, whole: dict[str, Tensor]) -> Iterator[tuple[list[object], Tensor]]:
    tensor = cut(local, whole)
    for piece in local.pieces:
        yield [local.name, list(piece.index), piece.row, piece.col], view(tensor, piece, piece.rect)


def test_a_seed_gives_the_same_bits_alone_and_in_any_batch(engine: Engine) -> None:
    asked = tiny.requests(12, max_tokens=10)
    together = tiny.sample(engine, asked)
    assert {each.key: tiny.sample(engine, [each])[each.key] for each in asked[:3]} == {each.key: together[each.key] for each in asked[:3]}
