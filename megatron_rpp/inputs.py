"""What a run reads before anything heavy starts: the tokenizer, the stop tokens and the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rpp.data.codec import Codec
from megatron_rpp.data.prompts import PromptSet, PromptStream, load_prompts
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
    """Read and check everything that data and model.hf name. Every rank reads the same files.

    Raises: DataError, ConfigError; also when data.train holds fewer prompts than one step takes.
    """
    cfg = process.cfg
    codec = open_codec(process)
    paths = [cfg.data.train] if cfg.data.eval is None else [cfg.data.train, cfg.data.eval]
    train, *held_out = read_prompts(process, codec, paths)
    stream = PromptStream(train.prompts, cfg.run.seed)
    stream.check_enough(cfg.rollout.prompts_per_step)
    return Inputs(codec, stream, held_out[0] if held_out else None)


def open_codec(process: Process) -> Codec:
    """The codec of model.hf; says what ends a response, and what is odd about the tokenizer. Raises: as `Codec.open`."""
    codec = Codec.open(process.cfg)
    for warning in codec.warnings:
        process.log.warn(warning)
    process.log.say(f"        responses end at {codec.stop.describe(codec.text_of)}")
    return codec


def read_prompts(process: Process, codec: Codec, paths: Sequence[Path]) -> list[PromptSet]:
    """The prompts of each file; rows that were skipped are counted in a warning and listed in bad_rows.json.

    Raises: DataError.
    """
    found = [load_prompts(process.cfg.data, codec, path=path) for path in paths]
    bad_rows = [row for prompts in found for row in prompts.bad_rows]
    for prompts in found:
        if prompts.bad_rows:
            process.log.warn(f"{prompts.path}: skipped {len(prompts.bad_rows)} rows (data.on_bad_row=skip); bad_rows.json lists them")
    if bad_rows and process.is_first:
        process.dir.write_json("bad_rows.json", [asdict(row) for row in bad_rows])
    return found


def many_truncated_warning(truncated_frac: float, limit: str, codec: Codec) -> str | None:
    """Says so when most responses run into the length limit. limit: the setting that holds it."""
    if truncated_frac <= MANY_TRUNCATED:
        return None
    return (
        f"{truncated_frac:.0%} of the responses ran into the length limit ({limit}); "
        f"a response ends at {codec.stop.describe(codec.text_of)}. "
        "Raise the limit, or name the model's own end token in rollout.stop_tokens"
    )
