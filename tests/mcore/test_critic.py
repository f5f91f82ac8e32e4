"""The critic on every kind of layout against plain PyTorch: values, updates, its optimizer's state through a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.config.schema import Config, Critic
from megatron_rpp.data.packing import select, split_minibatches, token_index
from megatron_rpp.types import PackedBatch
from tests.dist.ranks import run_ranks
from tests.mcore import tiny
from tests.mcore.hf import transformers as import_transformers

LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "pp2 vpp2": {"pp": 2, "vpp": 2}, "dp2": {"dp": 2}, "cp2": {"cp": 2}}
KIND = "qwen2"  # tied: what a critic has no use for
LR, MINIBATCHES, CLIP = 0.02, 2, 0.15


def _config(root: Path, **parallel: int) -> Config:
    cfg = tiny.make_config(root / KIND, algo={"estimator": "gae", "minibatches": MINIBATCHES}, **parallel)
    return replace(cfg, critic=Critic(lr=LR, value_clip=CLIP))


def _batch(dp_rank: int = 0, dp_size: int = 1) -> tuple[PackedBatch, Tensor]:
    """A batch, and the return of each of its tokens."""
    return tiny.make_batch(tiny.make_groups(), dp_rank, dp_size, num_minibatches=MINIBATCHES)


def _open(cfg: Config, groups) -> Any:
    from megatron_rpp.mcore.critic import Critic as Model
    from megatron_rpp.weights.families.registry import describe
    from megatron_rpp.weights.hf_io import open_hf
    from megatron_rpp.weights.live import live_weights
    from megatron_rpp.weights.load import fill

    critic = Model.from_config(cfg, groups)
    checkpoint = open_hf(cfg.model.hf)
    model = describe(checkpoint.config).without_head()
    fill(live_weights(model, critic.named_local(), groups, dtype=critic.dtype, deadline_s=120.0), checkpoint)
    critic.weights_changed()
    return critic


def _train(critic: Any, batch: PackedBatch, return_T: Tensor, cfg: Config) -> tuple[Any, PackedBatch]:
    batch = replace(batch, value_T=critic.values(batch))
    return critic.update(batch, return_T, minibatches=MINIBATCHES, value_clip=cfg.critic.value_clip), batch


def _two_updates(rank: int, root: Path, name: str) -> dict[str, Any]:
    """Values before and after, with an update on nothing in between. tp2 saves after its first; the pipeline goes on from there too."""
    cfg = _config(root, **LAYOUTS[name])
    with tiny.megatron(cfg) as groups:
        batch, return_T = _batch(groups.coords.dp, groups.dp_size)
        critic = _open(cfg, groups)
        stats, first = _train(critic, batch, return_T, cfg)
        if name == "tp2":
            critic.save(root / "critic")
        masked = replace(first, mask_T=torch.zeros_like(first.mask_T))
        nothing = critic.update(masked, return_T, minibatches=MINIBATCHES, value_clip=cfg.critic.value_clip)
        _train(critic, batch, return_T, cfg)
        found = {"before": first.value_T, "stats": stats, "nothing": nothing, "after": critic.values(batch)}
        if name == "pp2 vpp2":
            other = _open(cfg, groups)
            other.load(root / "critic")
            _train(other, batch, return_T, cfg)
            found["resumed"] = other.values(batch)
    return found


@pytest.fixture(scope="module")
def answers(hf_root: Path) -> dict[str, list[dict[str, Any]]]:
    """By layout, then by rank."""
    return {name: run_ranks(2, _two_updates, hf_root, name, timeout_s=240, init=False) for name in LAYOUTS}


class Oracle:
    """The backbone of transformers with a row of zeros on top, and a loss as the paper writes it, token by token."""

    def __init__(self, hf: Path, cfg: Config) -> None:
        transformers = import_transformers()
        self.model = transformers.AutoModel.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
        self.head = torch.zeros(self.model.config.hidden_size, requires_grad=True)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        optim, decay = cfg.optim, cfg.optim.weight_decay
        self.parameters = [*matrices, *vectors, self.head]
        # Megatron decays what has two dimensions, and its head is a row of a matrix.
        self.adam = torch.optim.AdamW(
            [{"params": [*matrices, self.head], "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=LR,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        self.clip_grad = optim.clip_grad

    def values(self, batch: PackedBatch) -> Tensor:
        bounds = batch.cu_len_S1.tolist()
        parts = []
        for a, b in zip(bounds, bounds[1:], strict=False):
            value_T = self.model(batch.tokens_T[None, a:b]).last_hidden_state[0] @ self.head
            parts.append(torch.cat([value_T.new_zeros(1), value_T[:-1]]))
        return torch.where(batch.mask_T, torch.cat(parts), 0.0)

    def train(self, batch: PackedBatch, return_T: Tensor) -> float:
        old_T, total, tokens = self.values(batch).detach(), 0.0, 0
        for sequences in split_minibatches(batch.group_S, MINIBATCHES):
            part, index = select(batch, sequences), token_index(batch.cu_len_S1, sequences)
            losses = []
            for t, value in enumerate(self.values(part)):
                if part.mask_T[t]:
                    old, target = old_T[index][t], return_T[index][t]
                    held = old + (value - old).clamp(-CLIP, CLIP)
                    losses.append(0.5 * torch.maximum((value - target) ** 2, (held - target) ** 2))
            self.adam.zero_grad()
            (sum(losses) / len(losses)).backward()
            torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.clip_grad)
            self.adam.step()
            total, tokens = total + float(sum(losses)), tokens + len(losses)
        return total / tokens


@pytest.fixture(scope="module")
def expected(hf_root: Path) -> tuple[float, Tensor]:
    cfg = _config(hf_root)
    oracle, (batch, return_T) = Oracle(hf_root / KIND, cfg), _batch()
    loss = oracle.train(batch, return_T)
    oracle.train(batch, return_T)
    return loss, oracle.values(batch).detach()


def _whole(answers: dict[str, list[dict[str, Any]]], name: str, which: str) -> Tensor:
    """A [T] answer of the whole batch: that of rank 0, or put together from the shares of both dp ranks."""
    if name != "dp2":
        return answers[name][0][which]
    whole, _ = _batch()
    found = torch.zeros(whole.num_tokens)
    all_keys = list(zip(whole.group_S.tolist(), whole.score_S.tolist(), strict=True))
    for rank in range(2):
        share, _ = _batch(rank, 2)
        keys = zip(share.group_S.tolist(), share.score_S.tolist(), strict=True)
        found[token_index(whole.cu_len_S1, [all_keys.index(key) for key in keys])] = answers[name][rank][which]
    return found


Answers = dict[str, list[dict[str, Any]]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_start_at_zero_and_follow_plain_pytorch_through_two_updates_and_one_on_nothing(
    name: str, answers: Answers, expected: tuple[float, Tensor]
) -> None:
    loss, value_T = expected
    assert not _whole(answers, name, "before").any()
    assert value_T.abs().max() > 0.05, "the oracle has learnt nothing, so this compares nothing"
    torch.testing.assert_close(_whole(answers, name, "after"), value_T, rtol=0, atol=2e-5)
    stats = answers[name][0]["stats"]
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    assert stats.values["value_loss"] == pytest.approx(loss, rel=1e-5)
    assert answers[name][0]["nothing"].num_minibatches == 0


def test_a_critic_saved_on_one_layout_goes_on_on_another(answers: Answers, expected: tuple[float, Tensor]) -> None:
    torch.testing.assert_close(answers["pp2 vpp2"][0]["resumed"], expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["tp2", "pp2 vpp2"])
def test_all_ranks_of_a_replica_hold_the_same_values(name: str, answers: Answers) -> None:
    assert torch.equal(answers[name][0]["after"], answers[name][1]["after"])
