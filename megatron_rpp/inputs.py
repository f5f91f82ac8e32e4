"""What a run reads before anything heavy starts: the tokenizer, the stop tokens and the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rpp.config.schema import Config
from megatron_rpp.data.codec import Codec
from megatron_rpp.data.prompts import PromptSet, PromptStream, fingerprint, load_prompts
from megatron_rpp.dist.collectives import gather_objects
from megatron_rpp.errors import DataError
from megatron_rpp.process import Process

MANY_TRUNCATED = 0.5  # the share of truncated responses above which a run warns


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a training run.

    codec: how text becomes tokens.
    train: the stream of training prompts, at its start.
    held_out: the prompts of data.eval, None without one.
    """

    codec: Codec
    train: PromptStream
    held_out: PromptSet | None


def read_inputs(process: Process) -> Inputs:
    """Read and check everything that data and model.hf name. Collective: every rank reads the same files.

    Raises: DataError, ConfigError, on every rank when it happens on one; also when data.train holds fewer prompts than
    one step takes, and when two ranks read different prompts.
    """
    cfg = process.cfg
    codec = open_codec(process)
    paths = [cfg.data.train] if cfg.data.eval is None else [cfg.data.train, cfg.data.eval]
    train, *held_out = read_prompts(process, codec, paths)
    if len(train.prompts) < cfg.rollout.prompts_per_step:
        skipped = f"; {len(train.bad_rows)} rows were skipped" if train.bad_rows else ""
        raise DataError(
            "there are fewer prompts than one step takes",
            where=str(train.path),
            expected=f"at least {cfg.rollout.prompts_per_step} (rollout.prompts_per_step)",
            got=f"{len(train.prompts)} usable prompts{skipped}",
            fix="lower rollout.prompts_per_step, or add prompts",
        )
    return Inputs(codec, PromptStream(train.prompts, cfg.run.seed), held_out[0] if held_out else None)


def open_codec(process: Process, *, policy_only: bool = False) -> Codec:
    """The codec of model.hf; logs the stop tokens, and what is odd about the tokenizer. Collective.

    Raises: as `Codec.open`, on every rank when it happens on one.
    """
    found: list[Codec] = []
    what = "read the tokenizer"
    process.together(what, lambda: found.append(Codec.open(process.cfg, policy_only=policy_only)), here=True)
    for warning in found[0].warnings:
        process.log.warn(warning)
    process.log.say(f"        stop tokens: {found[0].stop.describe(found[0].text_of)}")
    return found[0]


def read_prompts(process: Process, codec: Codec, paths: Sequence[Path]) -> list[PromptSet]:
    """The prompts of each file; rows that were skipped are counted in a warning and listed in bad_rows.json. Collective.

    Raises: DataError, on every rank when it happens on one.
    """
    data, found = process.cfg.data, []
    process.together("read the prompts", lambda: found.extend(load_prompts(data, codec, path=path) for path in paths), here=True)
    _check_equal(process, found)
    bad_rows = [row for prompts in found for row in prompts.bad_rows]
    for prompts in found:
        if prompts.bad_rows:
            text = f"{prompts.path}: skipped {len(prompts.bad_rows)} rows (data.on_bad_row=skip)"
            process.log.warn(f"{text}; bad_rows.json lists them")
    if bad_rows:
        rows = [asdict(row) for row in bad_rows]
        process.together("write bad_rows.json", lambda: process.dir.write_json("bad_rows.json", rows), here=process.is_first)
    return found


def _check_equal(process: Process, found: Sequence[PromptSet]) -> None:
    """Two hosts may hold different files under one name. Raises: DataError on every rank alike."""
    mine = [fingerprint(prompts.prompts) for prompts in found]
    of_ranks = gather_objects(mine, process.groups.world_cpu, name="prompts of all ranks", deadline_s=process.deadline_s)
    for place, prompts in enumerate(found):
        others = [rank for rank, theirs in enumerate(of_ranks) if theirs[place] != of_ranks[0][place]]
        if others:
            raise DataError(
                "the ranks read different prompts from this file",
                where=str(prompts.path),
                expected="the file of rank 0 on every host",
                got=f"another one on ranks {', '.join(map(str, others[:8]))}",
                fix="copy the file to every host, or put it on a shared file system",
            )


def held_out_limit(cfg: Config) -> str:
    """The setting that limits the length of an evaluation's answers."""
    return "rollout.max_response_tokens" if cfg.eval.max_response_tokens is None else "eval.max_response_tokens"


def many_truncated_warning(truncated_frac: float, limit: str, codec: Codec) -> str | None:
    """A warning when most responses run into the length limit. limit: the setting that holds it."""
    if truncated_frac <= MANY_TRUNCATED:
        return None
    return (
        f"{truncated_frac:.0%} of the responses ran into the length limit ({limit}); "
        f"stop tokens: {codec.stop.describe(codec.text_of)}. "
        "Raise the limit, or name the model's own end token in rollout.stop_tokens. "
        "This warning comes once; the column cut % shows every step"
    )
