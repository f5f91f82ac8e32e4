"""Rules between settings, all checked before anything heavy starts, and all broken ones reported at once.

A rule is a generator of `Problem`s over the settings that it speaks of. Values of the wrong type never get here: load.py
refuses them. Whatever a user sets that would have no effect is refused too, so that a setting in the file is always in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.fp8_rules import fp8_problems
from megatron_rpp.config.geometry import Geometry, derive, num_optimiser_steps, num_ranks
from megatron_rpp.config.layout_rules import engine_problems, layout_problems, router_problems
from megatron_rpp.config.options import option_problems
from megatron_rpp.config.problems import Problem, refuse
from megatron_rpp.config.ranges import COUNTS, range_of
from megatron_rpp.config.schema import Config, Eval
from megatron_rpp.config.validate_algo import algo_problems, algo_warnings, effect_problems
from megatron_rpp.errors import ConfigError, GeometryError
from megatron_rpp.hf.model import HfModel, read_model
from megatron_rpp.host import num_gpus
from megatron_rpp.input_file import why_unreadable


@dataclass(frozen=True, slots=True)
class Checked:
    """Settings that hold together: what follows from them, and what is allowed but worth a second look."""

    geometry: Geometry
    hf: HfModel
    warnings: tuple[str, ...]


def validate(
    cfg: Config,
    *,
    world_size: int | None = None,
    for_sft: bool = False,
    for_eval: bool = False,
    lines: Mapping[str, str] | None = None,
    source: str = "settings",
) -> Checked:
    """Check every rule.

    world_size: the number of processes, where it is known.
    for_sft: check what `rpp sft` needs too.
    for_eval: check what `rpp eval` needs; the engine reads the weights, which may be quantized.
    lines: where each dotted setting was written (load.load_with_lines).
    source: the name of the whole, for the first line of the message.
    Raises: ConfigError, or GeometryError when only layouts are wrong, with one line for each broken rule.
    """
    lines = lines or {}
    problems = [*_bounds(cfg)]
    are_counts = not {problem.path for problem in problems} & {*COUNTS}
    problems += [*_ranges(cfg), *_without_effect(cfg), *algo_problems(cfg)]
    # What a preset sets may be without effect where something written lies over another part of it.
    problems += [problem for problem in effect_problems(cfg) if not lines.get(problem.path, "").startswith("preset ")]
    problems += [*_inputs(cfg), *option_problems(cfg)]
    problems += _sft(cfg) if for_sft else ()
    if for_eval and cfg.data.eval is None:
        problems.append(Problem("data.eval", "required by `rpp eval`: a .jsonl or .parquet file of problems"))
    models: dict[str, HfModel] = {}
    for name, directory in models_read(cfg, policy_only=for_sft or for_eval):
        try:
            models[name] = read_model(directory, for_engine=for_eval)
        except ConfigError as error:
            problems.append(Problem(name, str(error)))
    hf = models.get("model.hf")
    kind = ConfigError if problems else GeometryError
    if are_counts:  # only then do the divisions below mean anything
        problems += [*_layout(cfg, world_size), *_engines(cfg), *_batches(cfg)]
        problems += [problem for name, model in models.items() for problem in _model(cfg, name, model)]
        problems += [*_lengths(cfg, hf), *fp8_problems(cfg, hf)] if hf is not None else []
        problems += engine_problems(cfg, hf) if hf is not None and not for_sft else []
    refuse([Problem(problem.path, problem.message, lines.get(problem.path, "")) for problem in problems], source, kind)
    assert hf is not None
    return Checked(derive(cfg, hf), hf, tuple(_warnings(cfg)))


def _bounds(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Numbers outside their range, and any that is not finite."""
    for spec in fields(section):
        name, value = f"{prefix}{spec.name}", getattr(section, spec.name)
        allowed = range_of(name)
        if is_dataclass(value):
            yield from _bounds(value, f"{name}.")
        elif allowed is not None:
            if value is not None and (problem := allowed.problem(value)) is not None:
                yield Problem(name, problem)
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(name, f"must be a finite number, got {value}")


def _ranges(cfg: Config) -> Iterator[Problem]:
    optim = cfg.optim
    if cfg.run.seed >= 2**32:
        yield Problem("run.seed", f"must be below 2^32, got {cfg.run.seed}")
    if not 0 < cfg.rollout.top_p <= 1:
        yield Problem("rollout.top_p", f"must be in (0, 1], got {cfg.rollout.top_p}; 1.0 samples from the whole distribution")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            yield Problem(f"optim.{name}", f"must be in [0, 1), got {getattr(optim, name)}")
    if optim.schedule != "constant" and optim.warmup_steps >= num_optimiser_steps(cfg):
        message = f"leaves the schedule none of the {num_optimiser_steps(cfg)} optimiser steps of the policy, got {optim.warmup_steps}"
        yield Problem("optim.warmup_steps", f"{message}; lower it, or set optim.schedule: constant")
    if optim.min_lr > optim.lr:
        yield Problem("optim.min_lr", f"must not exceed optim.lr = {optim.lr}, got {optim.min_lr}")


def _without_effect(cfg: Config) -> Iterator[Problem]:
    """Settings that nothing would read."""
    if cfg.eval.every > 0 and cfg.data.eval is None:
        yield Problem("eval.every", "has no effect without data.eval; set the file with the held-out problems")
    for name in ("max_prompts", "temperature"):
        if getattr(cfg.eval, name) != getattr(Eval(), name) and cfg.data.eval is None:
            yield Problem(f"eval.{name}", "has no effect without data.eval; set the file with the held-out problems")
    if cfg.optim.min_lr > 0 and cfg.optim.schedule == "constant":
        yield Problem("optim.min_lr", "has no effect with optim.schedule: constant; choose linear or cosine")


def _inputs(cfg: Config) -> Iterator[Problem]:
    files: dict[str, Path | None] = {"data.train": cfg.data.train, "data.eval": cfg.data.eval}
    for name, path in files.items():
        if path is not None and path.suffix not in (".jsonl", ".parquet"):
            yield Problem(name, f"must be a .jsonl or .parquet file, got {path}")
        elif path is not None and (reason := why_unreadable(path)):
            yield Problem(name, f"{reason}: {path}")
    checkpoint = cfg.model.megatron_checkpoint
    if checkpoint is not None and (reason := why_unreadable(checkpoint, is_directory=True)):
        yield Problem("model.megatron_checkpoint", f"{reason}: {checkpoint}")
    for name, path in {"run.dir": cfg.run.dir, "sft.out": cfg.sft.out}.items():
        reason = None if path is None else why_unreadable(path, is_directory=True)
        if reason not in (None, "no such directory"):  # it will be made
            yield Problem(name, f"{reason}: {path}")


def _sft(cfg: Config) -> Iterator[Problem]:
    if cfg.sft.train is None:
        yield Problem("sft.train", f"required by `rpp sft`: a .jsonl file of rows with {cfg.data.prompt_key!r} and 'response'")
    elif reason := why_unreadable(cfg.sft.train):
        yield Problem("sft.train", f"{reason}: {cfg.sft.train}")
    if cfg.sft.out is None:
        yield Problem("sft.out", "required by `rpp sft`: the HF directory that it writes")
    if cfg.sft.steps == 0:
        yield Problem("sft.steps", "required by `rpp sft`: at least 1, got 0")
    elif cfg.sft.warmup_steps >= cfg.sft.steps:
        yield Problem("sft.warmup_steps", f"leaves the schedule none of the {cfg.sft.steps} sft.steps, got {cfg.sft.warmup_steps}")


def _layout(cfg: Config, world_size: int | None) -> Iterator[Problem]:
    parallel = cfg.parallel
    ranks, replica = num_ranks(cfg), parallel.tp * parallel.cp * parallel.pp
    if parallel.vpp > 1 and parallel.pp == 1:
        yield Problem("parallel.vpp", f"virtual chunks need a pipeline: parallel.pp is 1, got vpp {parallel.vpp}")
    if world_size is not None and ranks != world_size:
        product = f"tp {parallel.tp} x cp {parallel.cp} x dp {parallel.dp} x pp {parallel.pp} = {ranks} ranks"
        fits = f"parallel.dp: {world_size // replica} would fit" if world_size % replica == 0 else f"one replica takes {replica} ranks"
        yield Problem("parallel.dp", f"{product}, but there are {world_size} processes; {fits}")


def _engines(cfg: Config) -> Iterator[Problem]:
    ranks, rollout = num_ranks(cfg), cfg.rollout
    if rollout.engines is None and ranks % rollout.tp:
        message = f"the {ranks} ranks do not divide into engines of {rollout.tp}"
        yield Problem("rollout.tp", f"{message}; choose a divisor, or set rollout.engines and leave some ranks without one")
    if rollout.engines is not None and rollout.engines * rollout.tp > ranks:
        message = f"{rollout.engines} engines of {rollout.tp} ranks need {rollout.engines * rollout.tp} ranks, there are {ranks}"
        yield Problem("rollout.engines", message)


def _batches(cfg: Config) -> Iterator[Problem]:
    prompts, minibatches = cfg.rollout.prompts_per_step, cfg.algo.minibatches
    if minibatches > prompts:
        yield Problem("algo.minibatches", f"{minibatches} minibatches cannot be cut from {prompts} prompts (rollout.prompts_per_step)")


def models_read(cfg: Config, *, policy_only: bool) -> Iterator[tuple[str, Path]]:
    """Every model that the command opens: the setting that names it, and its directory."""
    yield "model.hf", cfg.model.hf
    if policy_only:
        return
    if cfg.model.ref is not None and (cfg.algo.kl_reward_coef != 0 or cfg.algo.kl_loss_coef != 0):
        yield "model.ref", cfg.model.ref
    if cfg.critic.hf is not None and cfg.algo.estimator == "gae":
        yield "critic.hf", cfg.critic.hf


def _model(cfg: Config, name: str, hf: HfModel) -> Iterator[Problem]:
    """What a model demands of the trainer's layout. name: the setting that names the model."""
    for problem in (*layout_problems(hf, cfg.parallel, cfg.model.megatron), *router_problems(hf, cfg.model.megatron)):
        yield problem if name == "model.hf" else Problem(problem.path, f"{name}: {problem.message}")


def _lengths(cfg: Config, hf: HfModel) -> Iterator[Problem]:
    responses = {
        "rollout.max_response_tokens": cfg.rollout.max_response_tokens,
        "eval.max_response_tokens": cfg.eval.max_response_tokens,  # None: as long as those of the roll-out
    }
    for name, tokens in responses.items():
        longest = cfg.data.max_prompt_tokens + (tokens or 0)
        if tokens is not None and longest > hf.max_positions:
            message = f"{tokens} after data.max_prompt_tokens {cfg.data.max_prompt_tokens} makes {longest} tokens"
            yield Problem(name, f"{message}, the model has {hf.max_positions} positions")


def _warnings(cfg: Config) -> Iterator[str]:
    rollout, algo, ranks = cfg.rollout, cfg.algo, num_ranks(cfg)
    yield from algo_warnings(cfg)
    if cfg.model.dtype == "bfloat16" and (cfg.run.device == "cpu" or num_gpus() == 0):
        yield "model.dtype bfloat16 on a CPU is slow and inexact; set model.dtype: float32"
    if rollout.prompts_per_step % algo.minibatches:
        yield f"{rollout.prompts_per_step} prompts do not divide into algo.minibatches {algo.minibatches}: optimiser steps differ in size"
    if rollout.prompts_per_step * rollout.samples_per_prompt < cfg.parallel.dp * algo.minibatches:
        yield f"fewer responses than dp {cfg.parallel.dp} x minibatches {algo.minibatches}: some ranks train on nothing"
    if rollout.engines is not None and rollout.engines * rollout.tp < ranks:
        yield f"{ranks - rollout.engines * rollout.tp} of {ranks} ranks have no engine and idle during roll-out"
