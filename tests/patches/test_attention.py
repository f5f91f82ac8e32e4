"""Attention on the CPU against a slow oracle: packing, grouped heads, caches, masks, dropout, context-parallel order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import megatron_rpp_patches
from tests.dist.ranks import run_ranks

LENGTHS = [1, 5, 40, 2, 64, 33]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: Callable[[int, int], bool], scale: float) -> torch.Tensor:
    """Softmax attention of one sequence in float64, a query and a head at a time. [S, H, D] -> [S, H, D_v]."""
    repeat = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[0]):
        seen = [j for j in range(k.shape[0]) if not hidden(i, j)]
        for head in range(q.shape[1]):
            keys, values = k[seen, head // repeat].double(), v[seen, head // repeat].double()
            weights = torch.softmax(keys @ q[i, head].double() * scale, 0)
            out[i, head] = weights @ values
    return out


def attention(**options: Any) -> Any:
    """The module, in a process of one rank."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rpp_patches.megatron_core.spec.attention import CPUDotProductAttention

    settings = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "attention_dropout": 0.0, **options}
    return CPUDotProductAttention(TransformerConfig(**settings), 1, AttnMaskType.causal, "self")


def packed(lengths: list[int]) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets)


def qkv(total: int, seed: int = 0, *, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, n, 8, generator=generator, requires_grad=True) for n in (heads, groups, groups)]


def later(i: int, j: int) -> bool:
    return j > i


def check_packed_is_the_oracle() -> None:
    q, k, v = qkv(sum(LENGTHS))
    out = attention()(q, k, v, None, packed_seq_params=packed(LENGTHS))
    parts = zip(*(x.detach().split(LENGTHS) for x in (q, k, v)), strict=True)
    expected = torch.cat([oracle(*part, later, 1 / math.sqrt(8)) for part in parts])
    torch.testing.assert_close(out, expected.float().flatten(1), rtol=0, atol=2e-6)


def check_packing_does_not_change_a_bit() -> None:
    """Output and gradients of every sequence are those that it has alone, or in another order."""
    module = attention()
    results = []
    for order in (list(range(len(LENGTHS))), [4, 0, 2, 5, 1, 3]):
        inputs = [torch.cat([x.detach().split(LENGTHS)[i] for i in order]).requires_grad_() for x in qkv(sum(LENGTHS))]
        lengths = [LENGTHS[i] for i in order]
        out = module(*inputs, None, packed_seq_params=packed(lengths))
        out.square().sum().backward()
        splits = [x.split(lengths) for x in (out.detach(), *(x.grad for x in inputs))]
        results.append({i: [part[at] for part in splits] for at, i in enumerate(order)})
    for i, length in enumerate(LENGTHS):
        alone = [x.detach().split(LENGTHS)[i].clone().requires_grad_() for x in qkv(sum(LENGTHS))]
        out = module(*alone, None, packed_seq_params=packed([length]))
        out.square().sum().backward()
        for result in results:
            for got, expected in zip(result[i], (out.detach(), *(x.grad for x in alone)), strict=True):
                assert torch.equal(got, expected), f"sequence {i} of {length} tokens"


def check_unpacked_batch_is_the_oracle() -> None:
    q, k, v = (x.detach().view(7, 2, *x.shape[1:]) for x in qkv(14))
    out = attention()(q, k, v, None)
    for row in range(2):
        expected = oracle(q[:, row], k[:, row], v[:, row], later, 1 / math.sqrt(8))
        torch.testing.assert_close(out[:, row], expected.float().flatten(1), rtol=0, atol=2e-6)


def check_cache_and_masks_are_the_oracle() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    q, k, v = (x.detach().unsqueeze(1) for x in qkv(9))
    module = attention()
    module.softmax_scale = 0.25
    segments = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    mask = (segments[:, None] != segments[None, :])[None, None]
    cases = [
        (q[-1:], None, AttnMaskType.no_mask, lambda i, j: False),  # one new token sees the whole cache
        (q[-3:], None, AttnMaskType.causal, lambda i, j: j > i + 6),  # three new tokens, aligned at the end
        (q, None, AttnMaskType.no_mask, lambda i, j: False),
        (q, mask, AttnMaskType.arbitrary, lambda i, j: bool(mask[0, 0, i, j])),
        (q, mask, AttnMaskType.causal, lambda i, j: j > i or bool(mask[0, 0, i, j])),
    ]
    for number, (query, hidden, kind, rule) in enumerate(cases):
        out = module(query, k, v, hidden, attn_mask_type=kind)
        expected = oracle(query[:, 0], k[:, 0], v[:, 0], rule, 0.25).float().flatten(1)
        torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=2e-6, msg=f"case {number}")


def check_dropout_draws_from_the_tensor_parallel_stream() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    module = attention(attention_dropout=0.5)
    inputs = [x.detach() for x in qkv(12)]

    def call() -> torch.Tensor:
        model_parallel_cuda_manual_seed(3, tp_rank=0, ep_rank=0, etp_rank=0)
        before = torch.get_rng_state()
        out = module(*inputs, None, packed_seq_params=packed([12]))
        assert torch.equal(before, torch.get_rng_state()), "the default stream is left alone"
        return out

    first = call()
    assert torch.equal(first, call())
    assert not torch.equal(first, module.eval()(*inputs, None, packed_seq_params=packed([12])))
    assert get_cuda_rng_tracker().get_states()


def check_what_is_not_supported_is_refused() -> None:
    q, k, v = (x.detach() for x in qkv(4))
    with pytest.raises(ValueError, match=r"config\.window_size"):
        attention(window_size=(4, 0))
    with pytest.raises(ValueError, match=r"config\.softmax_type"):
        attention(softmax_type="off-by-one")
    with pytest.raises(ValueError, match="attention_bias"):
        attention()(q, k, v, None, attention_bias=q)
    with pytest.raises(ValueError, match="attention_mask cannot be combined"):
        attention()(q, k, v, torch.zeros(1, 1, 4, 4, dtype=torch.bool), packed_seq_params=packed([2, 2]))
    params = packed([4])
    params.qkv_format = "sbhd"
    with pytest.raises(ValueError, match="must be thd"):
        attention()(q, k, v, None, packed_seq_params=params)


def check_the_order_of_gathered_chunks() -> None:
    """Two ranks; sequences of 4 and 8 tokens a..d, e..l: chunk r and chunk 3 - r of each on rank r."""
    from megatron_rpp_patches.megatron_core.spec.attention import natural_order

    gathered = "ad" + "efkl" + "bc" + "ghij"
    assert "".join(gathered[i] for i in natural_order([4, 8], 2)) == "abcdefghijkl"
    assert natural_order([2, 6], 1).tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"multiples of 2 \* context_parallel_size = 4, got \[4, 6\]"):
        natural_order([4, 6], 2)


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}


def run_checks(rank: int) -> dict[str, str]:
    """All checks in one process that has the patches, so that pytest's own stays without them."""
    from tests.patches.behaviours import outcome

    megatron_rpp_patches.apply("megatron_core")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    return {name: outcome(check) for name, check in CHECKS.items()}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return run_ranks(1, run_checks)[0]


@pytest.mark.parametrize("name", CHECKS)
def test_attention(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""
