"""What transformers and plain PyTorch say: logits, log-probabilities, gradients and AdamW, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.config.schema import Config
from megatron_rpp.data.packing import select, split_minibatches, token_index
from megatron_rpp.types import PackedBatch
from tests.mcore import sparse
from tests.mcore.hf import transformers as import_transformers


def load(hf: Path) -> torch.nn.Module:
    transformers = import_transformers()
    return sparse.correct(transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager"))


def logits(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """[T, V], each sequence alone in its forward pass."""
    bounds = batch.cu_len_S1.tolist()
    parts = [model(batch.tokens_T[None, a:b]).logits[0] for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.cat(parts)


def logp_and_entropy(model: torch.nn.Module, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """[T] each, 0 outside the mask."""
    logp_TV = torch.log_softmax(logits(model, batch) / temperature, dim=-1)
    # token t is predicted at t - 1; the first of a sequence is predicted nowhere, and never in the mask
    logp_TV = torch.cat([logp_TV[-1:], logp_TV[:-1]])
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    logp_T = logp_TV.gather(1, batch.tokens_T[:, None])[:, 0]
    return torch.where(batch.mask_T, logp_T, 0.0), torch.where(batch.mask_T, entropy_T, 0.0)


@dataclass
class Updated:
    """After an update: weights and the last step's clipped gradients by Hugging Face name, and what the steps measured."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    grad_norm: float
    loss: float


def update(hf: Path, batch: PackedBatch, adv_T: Tensor, cfg: Config, objective, temperature: float) -> Updated:
    """The update as a textbook writes it: whole minibatch, loss divided by its tokens, clip, AdamW."""
    model = load(hf)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optim = cfg.optim
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    norms, loss_sum, token_sum = [], 0.0, 0
    for sequences in split_minibatches(batch.group_S, cfg.algo.minibatches):
        part, index = select(batch, sequences), token_index(batch.cu_len_S1, sequences)
        adam.zero_grad()
        loss, count, _ = objective(*logp_and_entropy(model, part, temperature), part, adv_T[index])
        (loss / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)))
        # an expert that no token chose has no gradient
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        adam.step()
        loss_sum, token_sum = loss_sum + float(loss.detach()), token_sum + int(count)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind = model.config.model_type
    return Updated(sparse.as_in_files(weights, kind), sparse.as_in_files(gradients, kind), sum(norms) / len(norms), loss_sum / token_sum)
