"""Log-probabilities from a sharded vocabulary against log_softmax, autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.mcore.vocab_logprob import VocabShard, vocab_parallel_logp
from tests.dist.ranks import run_ranks

VOCAB, HIDDEN, TOKENS = 37, 8, 11


def make(dtype: torch.dtype = torch.float64, rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, an output weight whose padding rows would win every softmax, and targets that include both ends."""
    generator = torch.Generator().manual_seed(7)
    hidden_ND = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VD[VOCAB:] = 1e3
    target_N = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    target_N[0], target_N[1] = 0, VOCAB - 1
    return hidden_ND.to(dtype), weight_VD.to(dtype), target_N


def plain(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The oracle: the whole softmax, by its definition."""
    logp_NV = torch.log_softmax(hidden_ND @ weight_VD[:VOCAB].t() / temperature, dim=-1)
    return logp_NV.gather(1, target_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def whole(rows: int = 40) -> VocabShard:
    return VocabShard.of_rank(VOCAB, rows, 0, None)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logp_and_entropy_equal_log_softmax_without_the_padding_rows(temperature: float) -> None:
    inputs = make()
    for got, wanted in zip(vocab_parallel_logp(*inputs, whole(), temperature=temperature), plain(*inputs, temperature), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 11, 100])
def test_gradients_equal_finite_differences_for_any_chunk(chunk_tokens: int) -> None:
    hidden_ND, weight_VD, target_N = make()
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    weigh = torch.linspace(-1.0, 2.0, TOKENS, dtype=torch.float64)

    def of(hidden: Tensor, weight: Tensor) -> Tensor:
        logp_N, entropy_N = vocab_parallel_logp(hidden, weight, target_N, whole(), temperature=0.7, chunk_tokens=chunk_tokens)
        return torch.stack([(logp_N * weigh).sum(), (entropy_N * weigh.flip(0)).sum()])

    assert torch.autograd.gradcheck(of, (hidden_ND, weight_VD), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_every_chunk_size_gives_the_same_log_probabilities() -> None:
    inputs = make(torch.float32)
    wanted = vocab_parallel_logp(*inputs, whole(), chunk_tokens=TOKENS)
    for chunk_tokens in (1, 3, 10):
        for got, want in zip(vocab_parallel_logp(*inputs, whole(), chunk_tokens=chunk_tokens), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_a_loss_of_logp_alone_and_of_nothing_has_a_backward() -> None:
    hidden_ND, weight_VD, target_N = make()
    for rows in (TOKENS, 0):
        hidden, weight = hidden_ND[:rows].clone().requires_grad_(), weight_VD.clone().requires_grad_()
        vocab_parallel_logp(hidden, weight, target_N[:rows], whole())[0].sum().backward()
        twin, twin_weight = hidden_ND[:rows].clone().requires_grad_(), weight_VD.clone().requires_grad_()
        plain(twin, twin_weight, target_N[:rows], 1.0)[0].sum().backward()
        torch.testing.assert_close(hidden.grad, twin.grad)
        torch.testing.assert_close(weight.grad, twin_weight.grad if rows else torch.zeros_like(weight))


def test_padding_rows_get_exactly_no_gradient() -> None:
    hidden_ND, weight_VD, target_N = make()
    weight_VD.requires_grad_()
    logp_N, entropy_N = vocab_parallel_logp(hidden_ND, weight_VD, target_N, whole())
    (logp_N.sum() + entropy_N.sum()).backward()
    assert torch.equal(weight_VD.grad[VOCAB:], torch.zeros_like(weight_VD[VOCAB:]))
    assert weight_VD.grad[:VOCAB].abs().min() > 0


def test_huge_logits_neither_overflow_nor_lose_the_winner() -> None:
    hidden_ND = torch.tensor([[1000.0], [-1000.0]])
    weight_VD = torch.tensor([[1.0], [0.5], [-1.0]])
    logp_N, entropy_N = vocab_parallel_logp(hidden_ND, weight_VD, torch.tensor([0, 0]), VocabShard(0, 3))
    assert logp_N.tolist() == [0.0, -2000.0] and entropy_N.tolist() == [0.0, 0.0]


def test_low_precision_inputs_are_normalised_in_float32() -> None:
    hidden_ND, weight_VD, target_N = make(torch.bfloat16)
    logp_N, _ = vocab_parallel_logp(hidden_ND, weight_VD, target_N, whole())
    logits_NV = (hidden_ND @ weight_VD[:VOCAB].t()).float()
    wanted = torch.log_softmax(logits_NV, -1).gather(1, target_N[:, None])[:, 0]
    assert logp_N.dtype == torch.float32
    torch.testing.assert_close(logp_N, wanted, rtol=0, atol=1e-6)


def _sharded(rank: int, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and gradients of this rank's shard, where the last rank may hold padding only."""
    tp = dist.get_world_size()
    hidden_ND, weight_VD, target_N = make(rows=rows * tp)
    mine = weight_VD[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden_ND.requires_grad_()
    shard = VocabShard.of_rank(VOCAB, rows, rank, dist.group.WORLD)
    values = vocab_parallel_logp(hidden_ND, mine, target_N, shard, temperature=0.8, chunk_tokens=4)
    (values[0].sum() - 0.3 * values[1].sum()).backward()
    dist.all_reduce(hidden_ND.grad)
    return [value.detach() for value in values], [hidden_ND.grad, mine.grad]


@pytest.mark.parametrize("rows", [20, 40], ids=["both ranks hold tokens", "the second rank holds padding only"])
def test_two_shards_give_the_values_and_gradients_of_one(rows: int) -> None:
    ranks = run_ranks(2, _sharded, rows)
    hidden_ND, weight_VD, target_N = make(rows=2 * rows)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    wanted = plain(hidden_ND, weight_VD, target_N, 0.8)
    (wanted[0].sum() - 0.3 * wanted[1].sum()).backward()
    for values, grads in ranks:
        for got, want in zip(values, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads[0], hidden_ND.grad, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(first, second) for first, second in zip(ranks[0][0], ranks[1][0], strict=True)), "ranks differ in bits"
    torch.testing.assert_close(torch.cat([grads[1] for _, grads in ranks]), weight_VD.grad, rtol=1e-12, atol=1e-12)
