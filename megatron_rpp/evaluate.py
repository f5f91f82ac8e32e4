"""`rpp eval`: the accuracy of an HF directory on a prompt file, by the engine and verifier that training uses."""

from __future__ import annotations

from functools import partial

from megatron_rpp.collect import Collector
from megatron_rpp.config.schema import Config
from megatron_rpp.engines import await_engines, open_engines
from megatron_rpp.errors import ConfigError
from megatron_rpp.heldout import evaluate, held_out_sampling
from megatron_rpp.inputs import held_out_limit, many_truncated_warning, open_codec, read_prompts
from megatron_rpp.process import open_process

VERSION = 0  # of the weights in the directory, which the engine loads by itself


def evaluate_model(cfg: Config) -> None:
    """Sample `cfg.data.eval` with the weights of `cfg.model.hf`, print the accuracy, write answers and a record to run.dir/rpp-eval.

    Raises: ConfigError, DataError, EngineError, DeadlineError.
    """
    if cfg.model.megatron_checkpoint is not None:
        raise ConfigError(
            "rpp eval reads the weights of model.hf, not those of a Megatron checkpoint",
            where="model.megatron_checkpoint",
            got=cfg.model.megatron_checkpoint,
            fix="convert it first: python tools/convert_megatron_to_hf.py",
        )
    with open_process(cfg, "eval") as process:
        codec = open_codec(process, policy_only=True)
        (held_out,) = read_prompts(process, codec, [cfg.data.eval])
        sampling = held_out_sampling(cfg, codec.stop.ids)
        longest = cfg.data.max_prompt_tokens + sampling.max_tokens
        with open_engines(process, codec.decode, max_sequence_tokens=longest, reads_weights=True) as sampler:
            await_engines(process, sampler, version=VERSION)
            collector = Collector(cfg, process.groups, sampler.rollouts, sampler.pool)
            result = evaluate(
                collector,
                held_out.prompts[: cfg.eval.max_prompts],
                version=VERSION,
                sampling=sampling,
                table=process.dir.path / "eval" / "model.jsonl",
                progress=partial(process.log.progress, "evaluation"),
            )
        if text := many_truncated_warning(result.truncated_frac, held_out_limit(cfg), codec):
            process.log.warn(text)
        process.log.evaluation(0, result.as_metrics())
