"""What one layout computes, for every kind of model, in one spawn: the tests compare the answers with transformers'."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.config.schema import Algo
from megatron_rpp.data.packing import select
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.dist.groups import Groups
from megatron_rpp.types import UpdateStats
from tests.dist.ranks import free_port, run_ranks
from tests.mcore import sparse, tiny

TEMPERATURE = 0.7

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": dict(tp=2),
    "tp2 without sequence parallel": dict(tp=2, sp=False),
    "tp4, more ranks than key-value heads": dict(tp=4),
    "pp2": dict(pp=2),
    "pp2, uneven": dict(pp=2, megatron=dict(num_layers_in_first_pipeline_stage=1)),
    "pp2 vpp2": dict(pp=2, vpp=2),
    "tp2 pp2": dict(tp=2, pp=2),
    "dp2": dict(dp=2),
    "cp2": dict(cp=2),
    "tp2 cp2": dict(tp=2, cp=2),
    "dp2 cp2": dict(dp=2, cp=2),
}

# The real objective where it counts responses: one ratio and one weight for each. Bounds that hold some of them and not others.
PER_RESPONSE: dict[str, Any] = dict(loss="gspo", aggregate="seq_mean_token_mean", clip_low=0.7, clip_high=0.2, minibatches=2)
PER_RESPONSE_LAYOUTS = ("tp1", "pp2", "dp2", "cp2", "dp2 cp2")


@dataclass
class Answer:
    """What rank 0 of a layout returns for one model. logp_T, logits_TV: of its own share of the batch where dp > 1. logits_TV:
    None with context parallelism, where no rank has them all."""

    logp_T: Tensor
    logits_TV: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    stats: UpdateStats | None = None
    is_same_on_all_ranks: bool = True
    left_out: dict[str, bool] | None = None


# For models with experts or latent attention, and which of them each layout is for.
SPARSE_LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tp1": ({}, tuple(sparse.MODELS)),
    "tp2": (dict(tp=2), ("qwen3_moe", "qwen2_moe", "deepseek_v3", "deepseek_v2", "deepseek_v2 lite")),
    "pp2": (dict(pp=2), ("qwen3_moe", "deepseek_v3")),
    "ep2 over dp2": (dict(dp=2, ep=2), ("qwen3_moe", "mixtral", "deepseek_v3")),
    "ep2 over cp2": (dict(cp=2, ep=2), ("qwen3_moe", "deepseek_v3")),
    "ep2 over tp2": (dict(tp=2, ep=2), ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3")),
    "etp2 over tp2": (dict(tp=2, etp=2), ("qwen3_moe", "deepseek_v3")),
    "tp2 dp2, ep2": (dict(tp=2, dp=2, ep=2), ("qwen3_moe", "deepseek_v3")),
    "pp2 vpp2 dp2, ep2": (dict(pp=2, vpp=2, dp=2, ep=2), ("qwen3_moe", "deepseek_v3")),
}


def answers(layout: str, root: Path) -> dict[str, Answer]:
    """Each kind of dense model under one layout, and "per response" on some."""
    return _of_world(num_ranks(LAYOUTS[layout]), root, is_sparse=False)[layout]


def sparse_answers(layout: str, root: Path) -> dict[str, Answer]:
    """The same for the sparse models that the layout is for."""
    return _of_world(num_ranks(SPARSE_LAYOUTS[layout][0]), root, is_sparse=True)[layout]


def num_ranks(sizes: dict[str, Any]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in ("tp", "pp", "dp", "cp"))


@cache
def _of_world(world: int, root: Path, *, is_sparse: bool) -> dict[str, dict[str, Answer]]:
    """The answers of every layout of so many ranks. Spawns once for all of them: a process may open Megatron again and again."""
    table = SPARSE_LAYOUTS if is_sparse else {layout: (sizes, tiny.KINDS) for layout, sizes in LAYOUTS.items()}
    jobs = {layout: (*job, free_port()) for layout, job in table.items() if num_ranks(job[0]) == world}
    return run_ranks(world, _worker, root, jobs, init=False, timeout_s=400.0)[0]


def _worker(rank: int, root: Path, jobs: dict[str, tuple[dict[str, Any], tuple[str, ...], int]]) -> dict[str, dict[str, Answer]]:
    found: dict[str, dict[str, Answer]] = {}
    for layout, (sizes, kinds, port) in jobs.items():
        os.environ["MASTER_PORT"] = str(port)  # the store of the layout before may live on for a while
        try:
            with tiny.megatron(tiny.make_config(root / kinds[0], **sizes)) as groups:
                found[layout] = {kind: _answer(root / kind, groups, sizes) for kind in kinds}
                if layout in PER_RESPONSE_LAYOUTS and kinds == tiny.KINDS:
                    found[layout]["per response"] = _per_response(root / "qwen3", groups, sizes)
        except Exception as error:
            error.add_note(f"in layout {layout}")
            raise
    return found


def _per_response(hf: Path, groups: Groups, sizes: dict[str, Any]) -> Answer:
    cfg = tiny.make_config(hf, algo=PER_RESPONSE, optim=dict(distributed=False), **sizes)
    policy = tiny.open_policy(cfg, groups)
    batch, adv_T = tiny.make_batch(tiny.make_groups(), groups.coords.dp, groups.dp_size, num_minibatches=2)
    stats = policy.update(batch, adv_T, cfg.algo, temperature=TEMPERATURE)
    return Answer(
        torch.empty(0), gradients=tiny.weights_as_hf(policy, cfg, of="gradients"), weights=tiny.weights_as_hf(policy, cfg), stats=stats
    )


def _answer(hf: Path, groups: Groups, sizes: dict[str, Any]) -> Answer:
    minibatches = 2
    cfg = tiny.make_config(hf, algo=dict(minibatches=minibatches), optim=dict(distributed=False), **sizes)
    policy = tiny.open_policy(cfg, groups)
    batch, adv_T = tiny.make_batch(tiny.make_groups(), groups.coords.dp, groups.dp_size, num_minibatches=minibatches)
    answer = Answer(policy.logprobs(batch, temperature=TEMPERATURE))
    answer.logits_TV = _logits(policy, batch) if groups.cp_size == 1 else None
    answer.stats = policy.update(batch, adv_T, cfg.algo, temperature=TEMPERATURE, objective=tiny.surrogate)
    answer.gradients = tiny.weights_as_hf(policy, cfg, of="gradients")
    answer.weights = tiny.weights_as_hf(policy, cfg)
    answer.is_same_on_all_ranks = _agree(answer, groups)
    if groups.pp_size > 1 and groups.dp_size > 1:
        answer.left_out = left_out(policy, groups)
    return answer


def left_out(policy, groups: Groups) -> dict[str, bool]:
    """What holds, on all ranks, of minibatches without a token to learn from, for a policy that has momentum.

    Four of them by the mask, four by the weights; then one has tokens, on the first dp rank alone.
    """
    algo, scheduler = Algo(minibatches=4), policy.optimizer.scheduler
    batch, adv_T = tiny.make_batch(tiny.make_groups(), groups.coords.dp, groups.dp_size, num_minibatches=4)
    group_T = torch.repeat_interleave(batch.group_S, torch.diff(batch.cu_len_S1))
    none_T, lone_T = torch.zeros_like(batch.mask_T), batch.mask_T & (group_T == 1) & (groups.coords.dp == 0)
    first, place = _copies(policy), scheduler.num_steps
    masked = policy.update(replace(batch, mask_T=none_T), adv_T, algo, objective=tiny.surrogate)
    weightless = policy.update(replace(batch, weight_T=none_T.float()), adv_T, algo, objective=tiny.surrogate)
    second = _copies(policy)
    lone = policy.update(replace(batch, mask_T=lone_T), adv_T, algo, objective=tiny.surrogate)
    third = _copies(policy)
    pulled = policy.update(replace(batch, weight_T=none_T.float()), adv_T, replace(algo, kl_loss_coef=0.1), objective=tiny.surrogate)
    mine = {
        "no step": [masked.num_minibatches, weightless.num_minibatches, masked.num_tokens, weightless.num_tokens] == [0] * 4,
        "weights and moments stay": all(map(torch.equal, first, second)),
        "one step": lone.num_minibatches == 1 and lone.grad_norm > 0,
        "it moves weights": not all(map(torch.equal, second, third)),
        "a term without the weight steps": pulled.num_minibatches == 4,
        "the schedule goes on": scheduler.num_steps == place + 16,
    }
    everywhere = gather_objects(mine, groups.world_cpu)
    return {name: all(share[name] for share in everywhere) for name in mine}


def _copies(policy) -> list[Tensor]:
    """This rank's weights, and what Adam keeps of them."""
    states = [state for part in policy.optimizer.inner.chained_optimizers for state in part.optimizer.state.values()]
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    assert moments
    return [tensor.detach().clone() for tensor in (*(tensor for _, _, tensor in policy.named_local()), *moments)]


def _logits(policy, batch) -> Tensor:
    """All logits, by the stock end of the model, through the same schedule."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_rpp.mcore import forward

    parts: list[tuple[Tensor, Tensor]] = []

    def keep(microbatch, output_1TV: Tensor, non_loss_data: bool = False) -> None:
        logits_TV = gather_from_tensor_model_parallel_region(output_1TV)[0, : microbatch.batch.num_tokens, : tiny.VOCAB]
        parts.append((microbatch.source_T, logits_TV))

    asked = [replace(microbatch, query=None) for microbatch in policy._packing.microbatches(batch, 1.0)]
    with torch.no_grad():
        forward._run(policy._wrapped, asked, keep, forward_only=True)
    logits_TV = torch.zeros(batch.num_tokens, tiny.VOCAB)
    for index, values in parts:
        logits_TV[index] = values
    dist.broadcast(logits_TV, group=policy.groups.pp, group_src=policy.groups.pp_size - 1)
    return logits_TV


def _agree(answer: Answer, groups: Groups) -> bool:
    """Log-probabilities on the ranks of one replica, and statistics on all ranks, are the same bits."""
    shares = gather_objects((groups.coords.dp, answer.logp_T, answer.stats), groups.world_cpu)
    return all(stats == answer.stats and (dp != groups.coords.dp or torch.equal(logp_T, answer.logp_T)) for dp, logp_T, stats in shares)


def empty_rank(rank: int, root: Path) -> dict[str, object]:
    """dp 2 with one response: rank 1 has no sequence. Then with a sequence whose mask is empty; then no rank has a token."""
    groups_of_one = tiny.make_groups(num_prompts=1, samples=1, seed=5)
    cfg = tiny.make_config(root / "qwen3", dp=2)
    with tiny.megatron(cfg) as groups:
        policy = tiny.open_policy(cfg, groups)
        batch, adv_T = tiny.make_batch(groups_of_one, groups.coords.dp, 2)
        logp_T = policy.logprobs(batch)
        first = policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)
        masked, adv_T = tiny.make_batch(groups_of_one, 0, 2)
        if rank == 1:
            masked = replace(masked, mask_T=torch.zeros_like(masked.mask_T))
        second = policy.update(masked, adv_T, cfg.algo, objective=tiny.surrogate)
        found = {"tokens": batch.num_tokens, "logp": logp_T.numel(), "stats": (first, second)}
        return {**found, "left out": left_out(policy, groups)}


def other_cuts(rank: int, root: Path) -> dict[int, tuple[UpdateStats, dict[str, Tensor]]]:
    """The same batch in micro-batches of 1, 40, 100 and 10000 tokens, and with its sequences in reverse order (0)."""
    found = {}
    with tiny.megatron(tiny.make_config(root / "qwen3")) as groups:
        for tokens in (1, 40, 100, 10000, 0):
            cfg = tiny.make_config(root / "qwen3", optim=dict(microbatch_tokens=tokens or 100, distributed=False))
            policy = tiny.open_policy(cfg, groups)
            batch, adv_T = tiny.make_batch(tiny.make_groups())
            if tokens == 0:
                from megatron_rpp.data.packing import token_index

                order = tuple(reversed(range(batch.num_sequences)))
                adv_T, batch = adv_T[token_index(batch.cu_len_S1, order)], select(batch, order)
            stats = policy.update(batch, adv_T, cfg.algo, objective=tiny.surrogate)
            found[tokens] = (stats, tiny.weights_as_hf(policy, cfg, of="gradients"))
    return found
