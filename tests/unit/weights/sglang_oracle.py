"""The parameters of every rank of an SGLang engine the slow way: from its model classes and their load_weights, no rectangles.

Takes a plain HF config and the HF tensors, and nothing from the code under test. tests/sglang proves it on the classes
themselves.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
_EXPERT = re.compile(r"^(?P<stem>.*\.experts)\.(?P<number>\d+)\.(?P<which>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")


def sglang_ranks(config: dict[str, Any], hf: Tensors, *, tp: int, ep: int = 1, attn_dp: int = 1) -> list[Tensors]:
    """SGLang's name -> tensor, for every rank of one engine; NaN in the padding of the vocabulary."""
    return [_dense(config, hf, tp, rank, attn_dp) | _experts(hf, tp, rank, ep) for rank in range(tp)]


def _dense(config: dict[str, Any], hf: Tensors, tp: int, rank: int, attn_dp: int) -> Tensors:
    attn = (tp // attn_dp, rank % (tp // attn_dp))
    found: Tensors = {}
    for name, tensor in hf.items():
        stem, _, last = name.rpartition(".")
        stem, _, module = stem.rpartition(".")
        if _EXPERT.match(name) or module in ("k_proj", "v_proj", "up_proj"):
            continue
        if module == "q_proj" and f"{stem}.k_proj.{last}" in hf:
            found[f"{stem}.qkv_proj.{last}"] = _qkv(config, [hf[f"{stem}.{letter}_proj.{last}"] for letter in "qkv"], *attn)
        elif module in ("q_proj", "q_b_proj", "kv_b_proj"):
            found[name] = tensor.chunk(attn[0])[attn[1]]
        elif module == "q_a_proj":
            found[f"{stem}.fused_qkv_a_proj_with_mqa.weight"] = torch.cat([tensor, hf[f"{stem}.kv_a_proj_with_mqa.weight"]])
        elif module == "kv_a_proj_with_mqa" and f"{stem}.q_a_proj.weight" in hf:
            continue
        elif module == "o_proj":
            found[name] = tensor.chunk(attn[0], dim=1)[attn[1]]
        elif module == "gate_proj":
            halves = [tensor.chunk(tp)[rank], hf[f"{stem}.up_proj.weight"].chunk(tp)[rank]]
            found[f"{stem}.gate_up_proj.weight"] = torch.cat(halves)
        elif module == "down_proj":
            found[name] = tensor.chunk(tp, dim=1)[rank]
        elif module in ("embed_tokens", "lm_head"):
            found[name] = _vocab(tensor, *(attn if module == "embed_tokens" else (tp, rank)))
        else:
            found[name] = tensor
    return found


def _qkv(config: dict[str, Any], parts: list[Tensor], ranks: int, rank: int) -> Tensor:
    q, k, v = parts
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    repeats = max(1, ranks // heads)
    k, v = (part.reshape(heads, -1, *part.shape[1:]).repeat_interleave(repeats, dim=0).flatten(0, 1) for part in (k, v))
    return torch.cat([part.chunk(ranks)[rank] for part in (q, k, v)])


def _vocab(weight: Tensor, ranks: int, rank: int) -> Tensor:
    rows = -(-weight.shape[0] // 64) * 64
    while rows % ranks:
        rows = -(-weight.shape[0] // (64 * ranks)) * 64 * ranks
    filler = torch.full((rows - weight.shape[0], weight.shape[1]), float("nan"), dtype=weight.dtype)
    return torch.cat([weight, filler]).chunk(ranks)[rank]


def _experts(hf: Tensors, tp: int, rank: int, ep: int) -> Tensors:
    """w13 and w2 of every layer: the experts of ep rank `rank // (tp / ep)`, each cut into tp / ep parts."""
    parts = tp // ep
    ep_rank, part = rank // parts, rank % parts
    layers: dict[str, dict[int, Tensors]] = {}
    for name, tensor in hf.items():
        if match := _EXPERT.match(name):
            layers.setdefault(match["stem"], {}).setdefault(int(match["number"]), {})[match["which"]] = tensor
    found: Tensors = {}
    for stem, experts in layers.items():
        share = len(experts) // ep
        w13, w2 = [], []
        for number in range(ep_rank * share, (ep_rank + 1) * share):
            one = experts[number]
            gate, up, down = (one[a] if a in one else one[b] for a, b in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")))
            w13.append(torch.cat([gate.chunk(parts)[part], up.chunk(parts)[part]]))
            w2.append(down.chunk(parts, dim=1)[part])
        found |= {f"{stem}.w13_weight": torch.stack(w13), f"{stem}.w2_weight": torch.stack(w2)}
    return found
