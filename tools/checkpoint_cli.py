"""What the checkpoint tools share: opening either kind of directory, a progress bar, errors in plain words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_rpp.errors import CheckpointError, RppError
from megatron_rpp.hf.model import HfModel, parse_model
from megatron_rpp.mcore.weights_header import check_model
from megatron_rpp.torch_dist.listing import is_torch_dist, read_header
from megatron_rpp.weights.convert import CARRIED, Options, Result
from megatron_rpp.weights.families.registry import describe
from megatron_rpp.weights.fp8_checkpoint import wide_config
from megatron_rpp.weights.hf_io import SHARD_BYTES, read_json
from megatron_rpp.weights.megatron_checkpoint import MegatronCheckpoint, open_megatron

DTYPES = ("float32", "float16", "bfloat16")


def hf_model(folder: Path) -> HfModel:
    """The model of a directory's config.json, however its weights are stored. Raises: CheckpointError, ConfigError."""
    return parse_model(wide_config(read_json(folder / "config.json")), where=str(folder / "config.json"))


def open_saved(folder: Path, hf: Path | None) -> tuple[MegatronCheckpoint, Path]:
    """A Megatron checkpoint, and the directory with its config.json: `hf`, or the one that it carries.

    Raises: CheckpointError, ConfigError.
    """
    if not is_torch_dist(folder):
        fix = "give the directory that holds .metadata and *.distcp; of a run, checkpoints/step-N/policy"
        raise CheckpointError("not a Megatron checkpoint", where=str(folder), expected="a file .metadata", got="none", fix=fix)
    carried = hf or folder / CARRIED
    if not (carried / "config.json").is_file():
        fix = "give the directory of its config.json and tokenizer with --hf"
        raise CheckpointError("the checkpoint does not carry its config", where=str(folder), got=f"no {carried / 'config.json'}", fix=fix)
    check_model(read_header(folder), hf_model(carried), where=str(folder))
    return open_megatron(folder, describe(read_json(carried / "config.json"))), carried


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="convert every tensor to this; default: keep each one's own")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is complete")
    parser.add_argument(
        "--shard-gb", type=positive, default=SHARD_BYTES / 1e9, metavar="GB", help="size of a file of OUT (default %(default)g)"
    )


def options_of(arguments: argparse.Namespace) -> Options:
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return Options(dtype=dtype, overwrite=arguments.overwrite, shard_bytes=int(arguments.shard_gb * 1e9))


def report(result: Result, out: Path, seconds: float, *, head: str) -> int:
    """The last lines of a conversion, and its exit status. head: what became of the head, from `head_note`."""
    if result.resumed_files:
        print(f"went on after {result.resumed_files} finished of {result.files} files")
    print(f"{out}: {result.num_bytes} bytes of weights in {result.files} files, {seconds:.1f} s")
    print(head)
    print(f"{result.tensors} tensors compared, all equal")
    return 0


def positive(text: str) -> float:
    """A number of gigabytes that is at least a byte. Raises: ValueError, which argparse words."""
    value = float(text)
    if not 1e-9 <= value < float("inf"):
        raise ValueError(text)
    return value


@contextmanager
def bar(total: int, *phases: str) -> Iterator[Callable[[str, int], None]]:
    """A bar for each phase; the function moves the one that it is told."""
    columns = (TextColumn("{task.description:<8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {phase: progress.add_task(phase, total=total) for phase in phases}
        yield lambda phase, num_bytes: progress.advance(tasks[phase], num_bytes)


def run(main: Callable[[], int]) -> int:
    """The exit status: of `main`, or of the error that ended it, whose message is printed."""
    try:
        return main()
    except RppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
