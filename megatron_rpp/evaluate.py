"""`rpp eval`: the accuracy of an HF directory on a prompt file, by the engine and verifier that training uses."""

from __future__ import annotations

from functools import partial

from megatron_rpp.collect import Collector
from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompts import load_prompts
from megatron_rpp.data.template import load_tokenizer
from megatron_rpp.engines import await_engines, open_engines
from megatron_rpp.errors import ConfigError
from megatron_rpp.heldout import evaluate
from megatron_rpp.process import open_process
from megatron_rpp.rollout.request import Sampling

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
        tokenizer = load_tokenizer(cfg.model.hf)
        prompts = load_prompts(cfg.data, tokenizer, path=cfg.data.eval).prompts[: cfg.eval.max_prompts]
        max_tokens = cfg.eval.max_response_tokens or cfg.rollout.max_response_tokens
        detokenise = partial(tokenizer.decode, skip_special_tokens=True)
        longest = cfg.data.max_prompt_tokens + max_tokens
        with open_engines(process, detokenise, max_sequence_tokens=longest, reads_weights=True) as sampler:
            await_engines(process, sampler, version=VERSION)
            collector = Collector(cfg, process.groups, sampler.rollouts, sampler.pool)
            result = evaluate(
                collector,
                prompts,
                version=VERSION,
                sampling=Sampling(max_tokens=max_tokens, temperature=cfg.eval.temperature),
                table=process.dir.path / "eval" / "model.jsonl",
                progress=partial(process.log.progress, "evaluation"),
            )
        process.log.evaluation(0, result.as_metrics())
