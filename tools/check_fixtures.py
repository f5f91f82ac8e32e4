"""Run a file of advantage fixtures through the package's own functions and compare every expected field.

    python tools/check_fixtures.py shared/fixtures/advantage_fixtures.json --exclude gae rloo ...

A fixture is {"id", "estimator", "inputs", "expected", optionally "variants"}. What it expects is compared in float64 with the
file's tolerance. Of the variants, which hold other conventions, those that an option of ours selects are compared too. An
estimator that this tool does not know is a failure unless it is left out by name. Exit codes: 0 all passed, 1 a failure, 2 a
file that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_rpp.algo.advantage import ESTIMATORS, compute_advantages
from megatron_rpp.algo.aggregate import constant_length, masked_sum, seq_mean_token_mean, seq_mean_token_sum, token_mean
from megatron_rpp.algo.baselines import Scores, clip_scores, group_mean_baseline
from megatron_rpp.algo.kl import adapted_coef, k1, k2, k3
from megatron_rpp.algo.objective import policy_objective
from megatron_rpp.algo.policy_loss import ppo_clip
from megatron_rpp.config.schema import Algo
from megatron_rpp.errors import RppError
from megatron_rpp.stats.moments import Moments, distributed_moments, merge, whiten
from megatron_rpp.types import PackedBatch

Values = Mapping[str, Any]
Answers = dict[str, Any]  # what the package computed: for `expected`, and for each variant that an option of ours selects
EXPECTED = "expected"
# A file's own word for the population or the centring that one of our options selects.
VARIANT_OPTIONS: dict[str, dict[str, Any]] = {
    "sample_weighted_population": {"norm_population": "sample"},
    "std_only_no_recentring": {"norm_recentre": False},
}


class UnusableFileError(Exception):
    """The file cannot be read as fixtures. The message is all that is printed."""


# ---- from rows of a fixture to a packed batch and back ----


def pack(inputs: Values) -> PackedBatch:
    """Rows as sequences behind a one-token prompt. Every value outside the mask is NaN, so reading one shows."""
    rows = [[False, *map(bool, row)] for row in inputs["mask"]]
    mask_T = torch.tensor([flag for row in rows for flag in row], dtype=torch.bool)
    groups = inputs.get("group", range(len(rows)))
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    truncated = inputs.get("truncated", [False] * len(rows))
    return PackedBatch(
        tokens_T=torch.zeros(mask_T.numel(), dtype=torch.int64),
        cu_len_S1=torch.tensor([0, *[len(row) for row in rows]], dtype=torch.int32).cumsum(0).int(),
        mask_T=mask_T,
        logp_rollout_T=torch.full((mask_T.numel(),), math.nan, dtype=torch.float64),
        score_S=torch.tensor(inputs["rewards"], dtype=torch.float64),
        group_S=torch.tensor([number_of[group] for group in groups], dtype=torch.int64),
        domain_S=torch.zeros(len(rows), dtype=torch.int64),
        version_S=torch.zeros(len(rows), dtype=torch.int64),
        is_truncated_S=torch.tensor(truncated, dtype=torch.bool),
        logp_old_T=packed_rows(inputs["logp_old"], mask_T) if "logp_old" in inputs else None,
        logp_ref_T=packed_rows(inputs["logp_ref"], mask_T) if "logp_ref" in inputs else None,
    )


def packed_rows(rows: Sequence[Sequence[float]], mask_T: Tensor) -> Tensor:
    """Values by row as the packed batch holds them, NaN outside the mask."""
    value_T = torch.tensor([value for row in rows for value in (math.nan, *row)], dtype=torch.float64)
    return torch.where(mask_T, value_T, math.nan)


def rows_of(value_T: Tensor, batch: PackedBatch) -> list[list[float]]:
    """Packed values as the fixture's rows, without the prompt token."""
    return [part[1:] for part in (list(p) for p in value_T.tensor_split(batch.cu_len_S1[1:-1].long()))]


# ---- one function for each family of fixtures: inputs -> answers by name of a variant ----


def answer_advantage(estimator: str) -> Callable[[Values], dict[str, Answers]]:
    def answer(inputs: Values) -> dict[str, Answers]:
        options = {
            "estimator": estimator,
            "gamma": inputs.get("gamma", 1.0),
            "kl_reward_coef": inputs.get("beta", inputs.get("beta_in_reward", 0.0)),
            "reward_clip": tuple(inputs["reward_clip"]) if inputs.get("reward_clip") else None,
        }
        answers = {EXPECTED: advantage_answers(inputs, Algo(**options))}
        for variant, changes in VARIANT_OPTIONS.items():
            answers[variant] = advantage_answers(inputs, Algo(**(options | changes)))["advantages"]
        return answers

    return answer


def advantage_answers(inputs: Values, algo: Algo) -> Answers:
    batch = pack(inputs)
    scores = Scores(batch.score_S, batch.group_S)
    if algo.estimator == "reinforce_pp_baseline":
        # The file gives a lone response the advantage 0. The package refuses such a group, so the file's rule is applied here.
        clipped = Scores(clip_scores(scores.score_S, algo.reward_clip), scores.group_S)
        centred_S = clipped.score_S - group_mean_baseline(clipped, batch.group_S, min_size=1)
        scores = pair_singletons(scores)
    else:
        centred_S = batch.score_S
    raw_T = ESTIMATORS[algo.estimator](batch, algo, scores)
    moments = distributed_moments(raw_T, batch.mask_T, None)
    adv_T, _ = compute_advantages(batch, algo, scores=scores, normaliser=lambda *args, **kwargs: whiten(*args, group=None, **kwargs))
    return {
        "returns": rows_of(raw_T, batch),
        "centred": centred_S.tolist(),
        "advantages": rows_of(adv_T, batch),
        "n_tokens": moments.n,
        "mean": moments.mean,
        "var_population": moments.variance,
    }


def pair_singletons(scores: Scores) -> Scores:
    """Gives each lone response a twin of equal score, so that its baseline is its own score. The twin is in no batch."""
    ids, counts = scores.group_S.unique(return_counts=True)
    is_lone_S = torch.isin(scores.group_S, ids[counts == 1])
    return Scores(torch.cat([scores.score_S, scores.score_S[is_lone_S]]), torch.cat([scores.group_S, scores.group_S[is_lone_S]]))


def answer_whiten(inputs: Values) -> dict[str, Answers]:
    if {"a", "b"} <= inputs.keys():
        merged = merge(*(Moments(n, mean, m2 / n) for n, mean, m2 in (inputs["a"], inputs["b"])))
        return {EXPECTED: {"n": merged.n, "mean": merged.mean, "M2": merged.m2}}
    ranks = [inputs[f"rank{rank}"] for rank in range(sum(bool(re.fullmatch(r"rank\d+", key)) for key in inputs))]
    parts = run_on_gloo(ranks)
    moments = parts[0]["moments"]
    if any(part["moments"] != moments for part in parts):
        raise AssertionError(f"the ranks disagree about the moments: {[part['moments'] for part in parts]}")
    return {
        EXPECTED: {
            "n": moments.n,
            "mean": moments.mean,
            "var_population": moments.variance,
            "var_unbiased": moments.m2 / (moments.n - 1) if moments.n > 1 else math.nan,
            "pass1_sums": [[part["n"], part["sum"]] for part in parts],
            "pass2_centred_sq": [part["centred_sq"] for part in parts],
            "out": [part["out"] for part in parts],
        }
    }


def run_on_gloo(ranks: Sequence[Sequence[Sequence[float]]]) -> list[Answers]:
    """Whitens each rank's rows on a process of its own; one answer for each rank."""
    with tempfile.TemporaryDirectory(prefix="fixtures-") as folder:
        mp.start_processes(_rank_main, args=(len(ranks), folder, ranks), nprocs=len(ranks), start_method="forkserver")
        # The files are this process's own children's.
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(len(ranks))]


def _rank_main(rank: int, size: int, folder: str, ranks: Sequence[Sequence[Sequence[float]]]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    x_T = torch.tensor([value for row in ranks[rank] for value in row], dtype=torch.float64)
    sequence_T = torch.tensor([number for number, row in enumerate(ranks[rank]) for _ in row], dtype=torch.int64)
    mask_T = torch.ones_like(x_T, dtype=torch.bool)
    out_T, moments = whiten(x_T, mask_T, sequence_T=sequence_T, group=dist.group.WORLD, deadline_s=60)
    centred_sq = float(masked_sum((x_T - moments.mean).square(), mask_T))
    answer = {"moments": moments, "n": x_T.numel(), "sum": float(x_T.sum()), "centred_sq": centred_sq, "out": out_T.tolist()}
    torch.save(answer, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def answer_ppo_clip(inputs: Values) -> dict[str, Answers]:
    losses, gradients = [], []
    mask_T = torch.ones(1, dtype=torch.bool)
    for ratio, adv, clip_low, clip_high, dual_clip in inputs["cases"]:
        new_T = torch.tensor([math.log(ratio) if ratio > 0 else -math.inf], dtype=torch.float64, requires_grad=True)
        adv_T = torch.tensor([adv], dtype=torch.float64)
        clipped = ppo_clip(new_T, torch.zeros_like(adv_T), adv_T, mask_T, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        clipped.loss_T.sum().backward()
        losses.append(clipped.loss_T.item())
        gradients.append(new_T.grad.item())
    return {EXPECTED: {"loss": losses, "dloss_dlogp": gradients}}


def answer_kl(inputs: Values) -> dict[str, Answers]:
    if "theta" in inputs:
        return {EXPECTED: kl_of_a_softmax(inputs)}
    if "horizon" in inputs:
        fixed = {"target": inputs["target"], "num_samples": inputs["n"], "horizon": inputs["horizon"]}
        return {EXPECTED: {"next": [adapted_coef(inputs["coef"], kl=kl, **fixed) for kl in inputs["kl"]]}}
    if "x" not in inputs:
        raise KeyError("x, theta or horizon")
    x_T = torch.tensor(inputs["x"], dtype=torch.float64)
    zero_T = torch.zeros_like(x_T)
    answers = {name: function(x_T, zero_T) for name, function in (("k1", k1), ("k2", k2), ("k3", k3))}
    if "ratio" in inputs:
        answers |= {f"ratio_{name}": torch.tensor(inputs["ratio"], dtype=torch.float64) * value for name, value in tuple(answers.items())}
    return {EXPECTED: {name: value.tolist() for name, value in answers.items()}}


def kl_of_a_softmax(inputs: Values) -> Answers:
    """Exact expectations under a categorical policy of the estimators and of their gradients in its logits."""
    theta = torch.tensor(inputs["theta"], dtype=torch.float64, requires_grad=True)
    logp_ref = torch.tensor(inputs["pi_ref"], dtype=torch.float64).log()
    logp = theta.log_softmax(0)
    pi = logp.exp().detach()

    def gradient(value: Tensor) -> list[float]:
        return torch.autograd.grad(value, theta, retain_graph=True)[0].tolist()

    answers: Answers = {
        "pi": pi.tolist(),
        "rkl": (logp.exp() * k1(logp, logp_ref)).sum().item(),
        "grad_rkl": gradient((logp.exp() * k1(logp, logp_ref)).sum()),
        "grad_fkl": gradient((logp_ref.exp() * k1(logp_ref, logp)).sum()),
    }
    for name, function in (("k1", k1), ("k2", k2), ("k3", k3)):
        expectation = (pi * function(logp, logp_ref)).sum()
        answers |= {f"e_{name}": expectation.item(), f"e_grad_{name}": gradient(expectation)}
    return answers


def answer_aggregate(inputs: Values) -> dict[str, Answers]:
    if "rank0_sum" in inputs:
        return {EXPECTED: aggregate_over_ranks(inputs)}
    lengths = [len(row) for row in inputs["mask"]]
    cu_len_S1 = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    mask_T = torch.tensor([bool(flag) for row in inputs["mask"] for flag in row])
    loss_T = torch.tensor([value for row in inputs["loss"] for value in row], dtype=torch.float64)
    loss_T = torch.where(mask_T, loss_T, math.nan)
    answers = {
        "token_mean": float(token_mean(loss_T, mask_T)),
        "seq_mean_token_mean": float(seq_mean_token_mean(loss_T, mask_T, cu_len_S1)),
        "seq_mean_token_sum": float(seq_mean_token_sum(loss_T, mask_T, cu_len_S1)),
    }
    if "L_const" in inputs:
        answers["const_len"] = float(constant_length(loss_T, mask_T, cu_len_S1, inputs["L_const"]))
    return {EXPECTED: answers}


def aggregate_over_ranks(inputs: Values) -> Answers:
    """Gradients averaged over ranks: each rank divides by the global count over the number of ranks."""
    sums = [torch.tensor([inputs[key]], dtype=torch.float64) for key in sorted(inputs) if key.endswith("_sum")]
    size, one = len(sums), torch.ones(1, dtype=torch.bool)
    denominator = sum(inputs[f"rank{rank}_tokens"] for rank in range(size)) / size
    losses = [float(token_mean(total, one, num_tokens=denominator)) for total in sums]
    return {f"rank{rank}_loss": loss for rank, loss in enumerate(losses)} | {"averaged": sum(losses) / size}


def answer_e2e(inputs: Values) -> dict[str, Answers]:
    """The whole way from scores to the gradient, with the token mean that Megatron would make of the sum."""
    has_groups = len(set(inputs["group"])) < len(inputs["group"])
    algo = Algo(
        estimator=inputs.get("estimator", "reinforce_pp_baseline" if has_groups else "reinforce_pp"),
        gamma=inputs.get("gamma", 1.0),
        kl_reward_coef=inputs.get("beta_in_reward", 0.0),
        kl_loss_coef=inputs.get("k2_loss_coef", 0.0),
        clip_low=inputs["eps_low"],
        clip_high=inputs["eps_high"],
        reward_clip=tuple(inputs["reward_clip"]) if inputs.get("reward_clip") else None,
    )
    answers = advantage_answers(inputs, algo)
    batch = pack(inputs)
    new_T = packed_rows(inputs["logp_new"], batch.mask_T).requires_grad_()
    adv_T = packed_rows(answers["advantages"], batch.mask_T)
    loss, num_tokens, metrics = policy_objective(new_T, None, batch, adv_T, algo)
    total = loss / num_tokens
    total.backward()
    mean = {name: float(value / num_tokens) for name, value in metrics.items()}
    return {
        EXPECTED: answers
        | {
            "policy_loss": mean["policy_loss"],
            "k2_loss": mean["kl_loss"],
            "total": total.item(),
            "grad_logp_new": rows_of(new_T.grad, batch),
            "clip_fraction": mean["clip_frac_low"] + mean["clip_frac_high"],
        }
    }


FAMILIES: dict[str, Callable[[Values], dict[str, Answers]]] = {
    "reinforce_pp": answer_advantage("reinforce_pp"),
    "reinforce_pp_baseline": answer_advantage("reinforce_pp_baseline"),
    "dist_whiten": answer_whiten,
    "ppo_clip": answer_ppo_clip,
    "kl": answer_kl,
    "aggregate": answer_aggregate,
    "e2e": answer_e2e,
}


# ---- comparing and reporting ----


def differences(expected: Any, got: Any, tolerance: tuple[float, float], where: str) -> list[str]:
    """What differs, one phrase for each place; nested lists and numbers."""
    if isinstance(expected, list):
        got = got if isinstance(got, list) else [got]
        if len(expected) != len(got):
            return [f"{where}: expected {len(expected)} values, got {len(got)}"]
        return [text for i, (e, g) in enumerate(zip(expected, got, strict=True)) for text in differences(e, g, tolerance, f"{where}[{i}]")]
    if isinstance(got, list):
        return [f"{where}: expected one value, got {len(got)}"]
    value, (rtol, atol) = float(got), tolerance
    return [] if abs(value - expected) <= atol + rtol * abs(expected) else [f"{where}: expected {expected}, got {value!r}"]


def check(fixture: Values, tolerance: tuple[float, float]) -> list[str]:
    """The failures of one fixture, one line each; none when every field agrees."""
    try:
        answers = FAMILIES[fixture["estimator"]](fixture["inputs"])
    except KeyError as error:
        return [f"{fixture['id']}: this tool does not understand the inputs {sorted(fixture['inputs'])} (looked for {error})"]
    except (RppError, ValueError, AssertionError) as error:
        return [f"{fixture['id']}: {type(error).__name__}: {' '.join(str(error).split())}"]
    problems = []
    for field, expected in fixture["expected"].items():
        if field not in answers[EXPECTED]:
            problems.append(f"{fixture['id']}: the tool computes no field {field!r}")
        else:
            problems += [f"{fixture['id']}: {text}" for text in differences(expected, answers[EXPECTED][field], tolerance, field)]
    for variant, expected in fixture.get("variants", {}).items():
        if variant in answers:
            problems += [f"{fixture['id']}: {text}" for text in differences(expected, answers[variant], tolerance, f"variant {variant}")]
    return problems


def load(path: Path) -> tuple[list[Values], tuple[float, float]]:
    """The fixtures of a file and its (rtol, atol).

    Raises: UnusableFileError.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UnusableFileError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnusableFileError(f"{path}: not JSON: {error}") from error
    fixtures = content.get("fixtures") if isinstance(content, dict) else None
    if not isinstance(fixtures, list) or not fixtures:
        raise UnusableFileError(f"{path}: expected an object with a list of fixtures under 'fixtures'")
    for number, fixture in enumerate(fixtures):
        missing = [key for key in ("id", "estimator", "inputs", "expected") if not isinstance(fixture, dict) or key not in fixture]
        if missing:
            raise UnusableFileError(f"{path}: fixture {number} lacks {', '.join(missing)}")
    text = str(content.get("conventions", {}).get("tolerance", "rtol 1e-8, atol 1e-9"))
    found = re.fullmatch(r"rtol ([\d.e+-]+), atol ([\d.e+-]+)", text)
    if found is None:
        raise UnusableFileError(f"{path}: cannot read conventions.tolerance {text!r}; expected such as 'rtol 1e-8, atol 1e-9'")
    return fixtures, (float(found[1]), float(found[2]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check advantage fixtures against the package's own functions.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--estimator", nargs="+", action="extend", metavar="NAME", help="only these")
    parser.add_argument("--exclude", nargs="+", action="extend", metavar="NAME", default=[], help="all but these")
    options = parser.parse_args(arguments)
    try:
        fixtures, tolerance = load(options.file)
        names = list(dict.fromkeys(fixture["estimator"] for fixture in fixtures))
        absent = [name for name in options.estimator or [] if name not in names]
        if absent:
            raise UnusableFileError(f"{options.file}: no fixture of estimator {', '.join(absent)}; it has {', '.join(names)}")
    except UnusableFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [name for name in (options.estimator or names) if name not in options.exclude]
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        print(f"unknown estimators in {options.file}: {', '.join(unknown)}; leave them out with --exclude {' '.join(unknown)}")
    passed = failed = 0
    for fixture in fixtures:
        if fixture["estimator"] not in chosen:
            continue
        known = fixture["estimator"] in FAMILIES
        problems = check(fixture, tolerance) if known else [f"{fixture['id']}: unknown estimator {fixture['estimator']!r}"]
        failed, passed = failed + bool(problems), passed + (not problems)
        for problem in problems:
            print(f"FAIL {problem}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["torch"])  # imported once, for all ranks of all fixtures
    sys.exit(main())
