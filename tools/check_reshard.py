"""Plan the way of the weights from a training layout to engines, carry it out in this process, compare every bit.

    python tools/check_reshard.py --hf-config examples/models/qwen3-32b.json --src tp=8,pp=4 --dst tp=8 --bytes-only
    python tools/check_reshard.py --matrix [--fp8]

--src  tp, pp, vpp, ep, etp and dp of the trainer. dp is as small as the rest allows where it is left out. Where the layers do not
       divide by pp, later stages have one more.
--dst  tp, ep, attn_dp of each engine; there are as many engines as fit on the trainer's ranks.
--bytes-only  plans without tensors, for models that do not fit here.
--matrix      small dense models and mixtures of experts in every combination of a table of splits, and a last line with counts.
--fp8         engines in block FP8. A tensor that the trainer holds in whole blocks of 128 x 128 travels as one byte an element and
              its scales; any other as it is, to be quantised where it arrives. Compared with quantising whole tensors. Pairs whose
              engine cuts inside a block are refused.

Prints one JSON line a pair: bytes_moved between GPUs; lower_bound, what every GPU needs and does not hold already; their ratio;
max_rank_bytes, the most that one GPU receives; plan_s, seconds that one rank takes to plan (without --bytes-only: all ranks);
with --fp8 wide_tensors, how many of the HF tensors that the engines keep in FP8 cannot be quantised where they lie.
Exit status 1 when a pair is not equal or moves more than the lower bound, 2 when the question makes no sense.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.errors import ConfigError, GeometryError, RppError
from megatron_rpp.weights.buckets import Transfer
from megatron_rpp.weights.families.parameter import Model
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8 import Fp8Pair, Fp8Source, Fp8Target, Fp8Tensors, Narrowing, final_locals
from megatron_rpp.weights.hf_io import read_json
from megatron_rpp.weights.layout import VOCAB_MULTIPLE, Layout, MegatronLayout, pad_vocab
from megatron_rpp.weights.planner import BUCKET_BYTES, Plan, plan
from megatron_rpp.weights.quantise import DTYPE as E4M3
from megatron_rpp.weights.quantise import SCALE_ENDING, is_quantised, quantise
from megatron_rpp.weights.rect import Local, Rect, view
from megatron_rpp.weights.sglang_layout import SGLangLayout

SRC_KEYS, DST_KEYS = ("tp", "pp", "vpp", "ep", "etp", "dp"), ("tp", "ep", "attn_dp")
MAX_ELEMENTS = 100_000_000  # with tensors: three copies of a model lie in memory
DTYPE = torch.bfloat16

_SIZES = dict(num_hidden_layers=4, hidden_size=24, intermediate_size=32, num_attention_heads=8, num_key_value_heads=4, vocab_size=301)
_QWEN_MOE = dict(_SIZES, moe_intermediate_size=16, num_experts=8)
_DEEPSEEK = dict(_SIZES, num_key_value_heads=8, moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1)
_DEEPSEEK |= dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(_SIZES, model_type="llama"),
    "qwen2, tied": dict(_SIZES, model_type="qwen2", tie_word_embeddings=True),
    "qwen3, wide heads": dict(_SIZES, model_type="qwen3", head_dim=6),
    "qwen2_moe": dict(_QWEN_MOE, model_type="qwen2_moe", shared_expert_intermediate_size=40),
    "qwen3_moe": dict(_QWEN_MOE, model_type="qwen3_moe", head_dim=6),
    "mixtral": dict(_SIZES, model_type="mixtral", num_local_experts=8),
    "deepseek_v2, whole query": dict(_DEEPSEEK, model_type="deepseek_v2", q_lora_rank=None),
    "deepseek_v3": dict(_DEEPSEEK, model_type="deepseek_v3"),
}
# With --fp8: wide enough for blocks, and narrow enough that some splits still cut inside one, on either side.
_FP8_SIZES = dict(hidden_size=128, intermediate_size=1024, moe_intermediate_size=512, shared_expert_intermediate_size=1024)
_FP8_SIZES |= dict(kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128)
_FP8_HEADS = {"llama": 128, "qwen2, tied": 64, "qwen3, wide heads": 128, "qwen2_moe": 64, "qwen3_moe": 128, "mixtral": 64}
FP8_MODELS = {name: {**config, **{key: size for key, size in _FP8_SIZES.items() if key in config}} for name, config in MODELS.items()}
FP8_MODELS |= {name: {**FP8_MODELS[name], "head_dim": size} for name, size in _FP8_HEADS.items()}
FP8_MODELS["deepseek_v3"]["q_lora_rank"] = 128
SRC = ("tp=1", "tp=2,pp=2", "tp=2,pp=2,vpp=2", "tp=4,pp=3", "tp=8", "tp=1,pp=4,dp=2", "tp=2,dp=4")
SRC_EXPERTS = ("tp=1,ep=8", "tp=2,ep=4,etp=2", "tp=2,pp=2,vpp=2,ep=2", "tp=4,pp=3,ep=2,etp=2", "tp=1,etp=4,pp=2", "tp=8,ep=4,pp=2")
DST = ("tp=1", "tp=2", "tp=4", "tp=8")
DST_EXPERTS = ("tp=1", "tp=4", "tp=4,ep=2", "tp=4,ep=4", "tp=8,ep=2", "tp=8,ep=8")
DST_DATA_PARALLEL = ("tp=4,attn_dp=2", "tp=8,attn_dp=8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Plan a change of layout, carry it out, compare every bit.")
    parser.add_argument("--hf-config", type=Path, help="a config.json")
    parser.add_argument("--src", default="tp=1", help="trainer, as in tp=2,pp=2,vpp=1,ep=1,etp=1")
    parser.add_argument("--dst", default="tp=1", help="engines, as in tp=4,ep=1,attn_dp=1")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--bucket-bytes", type=int, default=BUCKET_BYTES)
    parser.add_argument("--bytes-only", action="store_true")
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    try:
        return matrix(args) if args.matrix else one_pair(args)
    except RppError as error:
        print(one_line(error), file=sys.stderr)
        return 2


def one_pair(args: argparse.Namespace) -> int:
    if args.hf_config is None:
        raise ConfigError("which model?", where="--hf-config", expected="a config.json, or --matrix")
    if args.gpus_per_node < 1:
        raise ConfigError("not a number of GPUs", where="--gpus-per-node", got=args.gpus_per_node)
    model = describe(read_json(args.hf_config))
    if not args.bytes_only and model.num_parameters > MAX_ELEMENTS:
        raise ConfigError(f"{model.num_parameters:,} parameters are too many to carry here", where="--hf-config", fix="--bytes-only")
    row = check(model, args.src, args.dst, args)
    print(json.dumps(row))
    return int(is_wrong(row))


def matrix(args: argparse.Namespace) -> int:
    rows, refused, start = [], 0, time.monotonic()
    for name, model, src, dst in pairs(FP8_MODELS if args.fp8 else MODELS):
        try:
            rows.append({"model": name, **check(model, src, dst, args)})
            print(json.dumps(rows[-1]), flush=True)
        except OffGridError as error:
            refused += 1
            print(json.dumps({"model": name, "src": src, "dst": dst, "equal": None, "refused": one_line(error)}), flush=True)
    wrong = [row for row in rows if is_wrong(row)]
    worst = max((row["ratio"] for row in rows), default=1.0)
    counts = {"pairs": len(rows), "equal": sum(row["equal"] is True for row in rows), "wrong": len(wrong), "worst_ratio": worst}
    counts |= {"refused": refused} if args.fp8 else {}
    print(json.dumps({**counts, "seconds": round(time.monotonic() - start, 1)}))
    return int(bool(wrong))


def pairs(models: Mapping[str, Mapping[str, Any]] = MODELS) -> Iterator[tuple[str, Model, str, str]]:
    """The table: every training split with every engine split that the model has a use for."""
    for name, config in models.items():
        model = describe(config)
        has_experts = model.dims.experts > 0
        for src in (*SRC[1::2], *SRC_EXPERTS) if has_experts else SRC:
            more = DST_DATA_PARALLEL if model.has_attention_dp else ()
            for dst in (*(DST_EXPERTS if has_experts else DST), *more):
                yield name, model, src, dst


def one_line(error: RppError) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())


class OffGridError(RppError):
    """The engine cuts a parameter inside a block, so there is no FP8 form of what its ranks hold."""


def is_wrong(row: Mapping[str, Any]) -> bool:
    return row["equal"] is False or row["ratio"] != 1


def check(model: Model, src_text: str, dst_text: str, args: argparse.Namespace) -> dict[str, Any]:
    """Plan one pair, carry it out unless only bytes are asked for, and count."""
    src_split, dst_split = split_of(src_text, SRC_KEYS, "--src"), split_of(dst_text, DST_KEYS, "--dst")
    src = trainer(model, src_split, dst_split["tp"])
    dst = SGLangLayout(model, dtype=DTYPE, engines=src.ranks // dst_split["tp"], **dst_split)
    way = in_fp8(src, dst, model) if args.fp8 else Way(src, dst)
    nodes = tuple(rank // args.gpus_per_node for rank in range(src.ranks))
    start = time.monotonic()
    found = plan(way.src, way.dst, rank=0 if args.bytes_only else None, nodes=nodes, bucket_bytes=args.bucket_bytes)
    plan_s = time.monotonic() - start
    received: dict[int, int] = defaultdict(int)
    # One rank's plan lists its own transfers, but its schedule says how much every other receives.
    amounts = ((lane.src, lane.dst, lane.stop - lane.start) for lane in found.schedule.lanes)
    if not args.bytes_only:
        amounts = ((transfer.src, transfer.dst, transfer.num_bytes) for transfer in found.transfers)
    for source, target, count in amounts:
        received[target] += count * (source != target)
    moved, bound = sum(received.values()), lower_bound(way.src, way.dst)
    return {
        "src": src_text,
        "dst": dst_text,
        "equal": None if args.bytes_only else is_equal(found, way, model),
        "bytes_moved": moved,
        "lower_bound": bound,
        "ratio": round(moved / bound, 4) if bound else float(moved == 0),
        "max_rank_bytes": max(received.values(), default=0),
        "buckets": len(found.buckets),
        "plan_s": round(plan_s, 2),
        **({} if way.wide is None else {"wide_tensors": way.wide}),
    }


Whole = Callable[[str, torch.dtype], Tensor]
Parts = Sequence[tuple[Transfer, Tensor]]


@dataclass(frozen=True)
class Way:
    """What the plan joins. wide: None where nothing is quantised, else how many HF tensors are only after they have arrived."""

    src: MegatronLayout | Fp8Source
    dst: SGLangLayout | Fp8Target
    wide: int | None = None

    def sources(self, whole: Whole) -> list[Mapping[str, Tensor]]:
        """The tensors of every source rank, before anything is quantised that may be."""
        if not isinstance(self.src, Fp8Source):
            return [cut(self.src.locals(rank), whole) for rank in range(self.src.ranks)]
        return [Fp8Tensors(self.src, rank, cut(self.src.inner.locals(rank), whole)) for rank in range(self.src.ranks)]

    def takers(self) -> list[Callable[[Parts], Parts]]:
        """What each target rank makes of what arrives."""
        if not isinstance(self.dst, Fp8Target):
            return [lambda parts: parts] * self.dst.ranks
        return [Narrowing(self.dst).take for _ in range(self.dst.ranks)]

    def kept(self, rank: int) -> Sequence[Local]:
        """The tensors of a target rank in the end."""
        return final_locals(self.dst, rank) if isinstance(self.dst, Fp8Target) else self.dst.locals(rank)


def in_fp8(src: MegatronLayout, dst: SGLangLayout, model: Model) -> Way:
    """Raises: OffGridError."""
    pair = Fp8Pair.of(src, dst, model.hf_shapes)
    try:
        for rank in range(dst.tp):  # engines are all alike
            pair.target.locals(rank)
    except GeometryError as error:
        raise OffGridError(error.what, where=error.where, expected=error.expected, got=error.got, fix=error.fix) from error
    wide = sum(is_quantised(name) for name in model.hf_shapes) - len(pair.source.chosen)
    return Way(pair.source, pair.target, wide)


def split_of(text: str, keys: tuple[str, ...], where: str) -> dict[str, int]:
    """{"tp": 2, ...} of "tp=2,pp=2"; what is left out is 1, dp is 0."""
    split = {key: int(key != "dp") for key in keys}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in split or not value.isdecimal() or int(value) < 1:
            raise ConfigError("not a split", where=where, expected=f"some of {', '.join(f'{key}=N' for key in keys)}", got=part)
        split[key] = int(value)
    return split


def trainer(model: Model, split: Mapping[str, int], engine_tp: int) -> MegatronLayout:
    """The training layout, with enough data parallelism for whole expert groups and whole engines."""
    tp, pp, vpp, ep, etp = (split[key] for key in ("tp", "pp", "vpp", "ep", "etp"))
    replicas = split["dp"]
    if not replicas:
        replicas = math.lcm(tp, ep * etp, engine_tp // math.gcd(engine_tp, pp)) // tp
    if tp * replicas * pp % engine_tp:
        raise ConfigError(
            "the engines do not fill the trainer's ranks", where="--dst", expected=f"a divisor of {tp * replicas * pp}", got=engine_tp
        )
    if vpp > 1:
        return MegatronLayout.even(model, tp=tp, pp=pp, vpp=vpp, dtype=DTYPE, replicas=replicas, ep=ep, etp=etp)
    layers = model.dims.layers
    if pp > layers:
        raise ConfigError(f"{layers} layers do not make {pp} stages", where="--src", got=f"pp={pp}")
    stages = tuple(tuple(range(stage * layers // pp, (stage + 1) * layers // pp)) for stage in range(pp))
    rows = pad_vocab(model.dims.vocab, VOCAB_MULTIPLE * tp)
    return MegatronLayout(model, tp, stages, DTYPE, rows, replicas=replicas, ep=ep, etp=etp)


def lower_bound(src: Layout, dst: Layout) -> int:
    """Bytes that each rank needs and does not hold itself, over all ranks. From the layouts alone."""
    total = 0
    for rank in range(dst.ranks):
        held: dict[str, list[Rect]] = defaultdict(list)
        for local in src.locals(rank):
            for piece in local.pieces:
                held[piece.rect.hf].append(piece.rect)
        for local in dst.locals(rank):
            for piece in local.pieces:
                own = (piece.rect.intersect(rect) for rect in held[piece.rect.hf])
                total += (piece.rect.area - sum(part.area for part in own if part)) * local.dtype.itemsize
    return total


def is_equal(found: Plan, way: Way, model: Model) -> bool:
    """Random HF tensors, cut for every source rank, moved by the plan, against the same tensors cut for every engine rank."""
    whole = whole_tensors(model)
    sources, takers = way.sources(whole), way.takers()
    targets = [blank(way.kept(rank)) for rank in range(way.dst.ranks)]
    for transfer in found.transfers:
        part = view(sources[transfer.src][transfer.src_local], transfer.src_piece, transfer.rect)
        for placed, values in takers[transfer.dst]([(transfer, part)]):
            view(targets[placed.dst][placed.dst_local], placed.dst_piece, placed.rect).copy_(values)
    # As bytes: the not-a-numbers of padding must be there still.
    return all(
        torch.equal(targets[rank][name].view(torch.uint8), tensor.view(torch.uint8))
        for rank in range(way.dst.ranks)
        for name, tensor in cut(way.kept(rank), whole).items()
    )


def whole_tensors(model: Model) -> Whole:
    """(name, dtype) -> a random HF tensor, or its FP8 form, or its scales; made when it is first asked for."""
    generator, made, scales = torch.Generator().manual_seed(0), {}, {}

    def whole(name: str, dtype: torch.dtype) -> Tensor:
        if name.endswith(SCALE_ENDING):
            whole(name.removesuffix(SCALE_ENDING), E4M3)
            return scales[name.removesuffix(SCALE_ENDING)]
        if (name, dtype) not in made:
            if dtype == E4M3:
                made[name, dtype], scales[name] = quantise(whole(name, DTYPE))
            else:
                made[name, dtype] = torch.randn(model.hf_shapes[name], generator=generator).to(dtype)
        return made[name, dtype]

    return whole


def blank(locals_: Sequence[Local]) -> dict[str, Tensor]:
    return {local.name: torch.full(local.shape, float("nan"), dtype=local.dtype) for local in locals_}


def cut(locals_: Sequence[Local], whole: Whole) -> dict[str, Tensor]:
    """The tensors of a rank, not-a-number where no HF tensor is."""
    tensors = blank(locals_)
    for local in locals_:
        for piece in local.pieces:
            rect = piece.rect
            tensor = whole(rect.hf, local.dtype)
            matrix = tensor if tensor.dim() == 2 else tensor[:, None]
            view(tensors[local.name], piece, rect).copy_(matrix[rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols])
    return tensors


if __name__ == "__main__":
    sys.exit(main())
