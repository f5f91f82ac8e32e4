"""Supervised warm-up through the same Megatron policy that is trained afterwards, from an HF directory to an HF directory."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.config.schema import Config
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.examples import load_examples
from megatron_rpp.data.packing import pack_groups
from megatron_rpp.data.prompts import PromptStream
from megatron_rpp.errors import ConfigError, NumericsError
from megatron_rpp.files import refuse_full, refuse_unusable
from megatron_rpp.process import open_policy, open_process
from megatron_rpp.weights.export import export_bytes, export_hf


def supervise(cfg: Config) -> None:
    """Teach `cfg.model.hf` the examples of `cfg.sft.train` for `cfg.sft.steps` steps; write the result to `cfg.sft.out`.

    loss = mean over the response tokens of the step of -logp;  the learning rate falls along a cosine to optim.min_lr.
    Raises: ConfigError, DataError, NumericsError; CheckpointError when the result cannot be written.
    """
    _check(cfg)
    codec = Codec.open(cfg, policy_only=True)
    examples = load_examples(cfg.data, codec, cfg.sft.train, max_tokens=cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens)
    optim = replace(cfg.optim, lr=cfg.sft.lr, warmup_steps=cfg.sft.warmup_steps, schedule="cosine")
    with open_process(cfg, "sft") as process:
        for warning in codec.warnings:
            process.log.warn(warning)
        process.log.say(f"        responses end with {codec.stop.end} {codec.text_of(codec.stop.end)!r}")
        policy, live = open_policy(process, cfg=replace(cfg, optim=optim), total_steps=cfg.sft.steps)
        num_bytes = export_bytes(live)
        process.together("look for room for sft.out", lambda: refuse_full(cfg.sft.out, num_bytes, "sft.out"), here=process.is_first)
        stream = PromptStream(examples.prompts, cfg.run.seed)
        for step in range(1, cfg.sft.steps + 1):
            taken = [examples.group_of[prompt.uid] for prompt in stream.take(min(cfg.sft.batch_sequences, len(stream)))]
            stats = policy.supervise(pack_groups(taken, process.groups.coords.dp, process.groups.dp_size))
            if not stats.is_finite:
                raise NumericsError("the loss or its gradient is not finite", where=f"sft step {step}", got=stats.loss, fix="lower sft.lr")
            values = {"sft/loss": stats.loss, "sft/grad_norm": stats.grad_norm, "sft/lr": stats.values["lr"]}
            process.log.sft(step, cfg.sft.steps, values)
        export_hf(live, cfg.sft.out, source=cfg.model.hf, deadline_s=cfg.run.deadline_s)


def _check(cfg: Config) -> None:
    missing = [name for name in ("train", "out") if getattr(cfg.sft, name) is None]
    if missing or cfg.sft.steps < 1:
        raise ConfigError(
            "rpp sft needs to know what to learn, for how long, and where to write it",
            where="sft",
            expected="sft.train, sft.out and sft.steps >= 1",
            got=f"missing: {', '.join(missing) or 'none'}; steps: {cfg.sft.steps}",
        )
    refuse_unusable(cfg.sft.out, "sft.out")
    if cfg.sft.out.exists():
        raise ConfigError("the output exists already", where=f"sft.out={cfg.sft.out}", fix="remove it, or choose another sft.out")
